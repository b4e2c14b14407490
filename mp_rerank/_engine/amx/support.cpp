// Whether this process can compute in AMX tiles, and of which sources this library is.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" {

// The number that `hatch_build.py` makes of the sources.
unsigned mp_sources() { return MP_SOURCES; }

// 0: it can; 1: the CPU has no AMX, or not AVX-512 with bfloat16; 2: the system does not let it.
int mp_unsupported() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 1;
    const bool tiles = (d >> 22 & 1) && (d >> 24 & 1);                                         // AMX-BF16, AMX-TILE
    const bool vectors = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);     // AVX-512 F, DQ, BW, VL
    if (!tiles || !vectors) return 1;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return 1;                   // AVX-512 BF16
    // Linux gives a process AMX's registers when it asks for them. Its forks have them too.
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) ? 2 : 0;
}
}
