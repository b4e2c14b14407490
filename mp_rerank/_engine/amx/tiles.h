// Products of matrices in AMX tiles, and 16 numbers at a time with AVX-512: what the kernels here are made of.
//
// A tile has 16 rows of 64 bytes. One instruction multiplies a tile of 16 x 32 bfloat16 numbers with one of 32 x 16, and
// adds the products to a tile of 16 x 16 float32 numbers.
//
// A float32 number is the sum of three bfloat16 numbers, its parts: the nearest one, the nearest one to what is left, and
// the rest. Of the nine products of two numbers' parts the six largest are computed; the others are below float32's last
// bit. So products of float32 matrices come out as exact as float32 arithmetic gives them, on AMX, but for numbers of no
// model: below 1e-33 digits are lost, and infinity, or what is within half a percent of float32's largest number, gives none.
#pragma once

#if !defined(__GNUC__) || defined(__clang__) || __GNUC__ < 11
#error "GCC 11 or newer is needed: another compiler's OpenMP is not the one that torch has loaded"
#endif

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")

#include <immintrin.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef uint16_t bf16;

constexpr int TILE_ROWS = 16;                   // of a tile of any kind
constexpr int TILE_DEPTH = 32;                  // bfloat16 numbers in a row of a tile
constexpr int TILE = TILE_ROWS * TILE_DEPTH;    // bfloat16 numbers in a tile
constexpr int BLOCK = 2 * TILE_ROWS;            // rows, and columns, that are computed together: 2 x 2 tiles
constexpr int FLOAT_PARTS = 3;                  // bfloat16 numbers that make up a float32 number

// How many of `size` numbers hold `count`, the last one not always full.
static inline long tiles_of(long count, long size) { return (count + size - 1) / size; }

// Tiles 0 to 3 hold sums, 4 and 5 rows, 6 and 7 columns.
static inline void begin_tiles() {
    alignas(64) static const uint8_t shape[64] = {
        1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,                  // palette 1
        64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,          // bytes in a row, of tiles 0 to 7
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0};         // rows
    _tile_loadconfig(shape);
}

static inline void end_tiles() { _tile_release(); }

// Begin a block of sums with zeros, or with a number for each of its 32 columns.
static inline void begin_sums(const float *columns) {
    if (columns) {  // read again for each row: at a distance of 0 bytes
        _tile_loadd(0, columns, 0);
        _tile_loadd(1, columns + 16, 0);
        _tile_loadd(2, columns, 0);
        _tile_loadd(3, columns + 16, 0);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

// A block of sums is four tiles of 16 x 16 float32 numbers: by themselves one after the other, as upper left, upper right,
// lower left, lower right; or part of a matrix of so many columns.
struct Place {
    long row, right, lower;  // bytes to the next row, and numbers to the tile at the right and to the one below

    static Place alone() { return {64, 256, 512}; }
    static Place within(long columns) { return {columns * (long)sizeof(float), 16, 16 * columns}; }
};

static inline void load_sums(const float *sums, Place place) {
    _tile_loadd(0, sums, place.row);
    _tile_loadd(1, sums + place.right, place.row);
    _tile_loadd(2, sums + place.lower, place.row);
    _tile_loadd(3, sums + place.lower + place.right, place.row);
}

static inline void store_sums(float *sums, Place place) {
    _tile_stored(0, sums, place.row);
    _tile_stored(1, sums + place.right, place.row);
    _tile_stored(2, sums + place.lower, place.row);
    _tile_stored(3, sums + place.lower + place.right, place.row);
}

static inline void load_rows(const bf16 *rows) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, rows + TILE, 64);
}

// Of rows that are read once for each 32 columns: not to be kept in the L1 cache, where columns are read again and again.
static inline void stream_rows(const bf16 *rows) {
    _tile_stream_loadd(4, rows, 64);
    _tile_stream_loadd(5, rows + TILE, 64);
}

static inline void load_columns(const bf16 *columns) {
    _tile_loadd(6, columns, 64);
    _tile_loadd(7, columns + TILE, 64);
}

static inline void multiply_upper() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
}

static inline void multiply_lower() {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

static inline void multiply() {
    multiply_upper();
    multiply_lower();
}

// Add to the block of sums the products of 32 rows and 32 columns.
//
// rows, columns: for each 32 numbers of depth, and each part of them, two tiles one after the other.
// beside: work for the other units of the core, a little after each step: tiles take long and leave those free.
template <int PARTS, typename Work>
static inline void add_products(const bf16 *rows, const bf16 *columns, long steps, Work &beside) {
    constexpr long STEP = 2 * TILE * PARTS;
    for (long k = 0; k < steps; ++k, rows += STEP, columns += STEP) {
        if constexpr (PARTS == 1) {
            stream_rows(rows);
            load_columns(columns);
            multiply_upper();
            beside.step();
            multiply_lower();
        } else {
            load_rows(rows);
            load_columns(columns + 4 * TILE);
            multiply();  // the first part with the third
            load_columns(columns + 2 * TILE);
            multiply();  // the first with the second
            load_rows(rows + 2 * TILE);
            multiply();  // the second with the second
            load_columns(columns);
            multiply();  // the second with the first
            load_rows(rows + 4 * TILE);
            multiply();  // the third with the first
            load_rows(rows);
            multiply_upper();  // the first with the first
            beside.step();
            multiply_lower();
        }
    }
}

// Numbers, 16 at a time.

static inline __m512 widen(__m256i numbers) {  // bfloat16 to float32
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

static inline __m256i narrow(__m512 numbers) {  // float32 to the nearest bfloat16
    return (__m256i)_mm512_cvtneps_pbh(numbers);
}

static inline __mmask16 first(long count) {  // a mask of the first so many of 16
    return count >= 16 ? (__mmask16)0xffff : count <= 0 ? (__mmask16)0 : (__mmask16)((1u << count) - 1);
}

static inline __m512 load16(const float *from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
static inline __m512 load16(const bf16 *from, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, from)); }
static inline void store16(float *to, __mmask16 mask, __m512 numbers) { _mm512_mask_storeu_ps(to, mask, numbers); }
static inline void store16(bf16 *to, __mmask16 mask, __m512 numbers) { _mm256_mask_storeu_epi16(to, mask, narrow(numbers)); }

// The parts of 16 numbers, one after the other at distances of `apart`.
template <int PARTS>
static inline void store_parts(bf16 *to, long apart, __m512 numbers) {
    for (int part = 0; part < PARTS; ++part) {
        __m256i nearest = narrow(numbers);
        _mm256_storeu_si256((__m256i *)(to + part * apart), nearest);
        if (part + 1 < PARTS) numbers = _mm512_sub_ps(numbers, widen(nearest));
    }
}

static inline __m512 number(float x) { return _mm512_set1_ps(x); }

// e to the power of each number, by a Taylor polynomial on [-ln 2 / 2, ln 2 / 2] of degree 6, relative error below 2e-7; or
// (`ROUGH`, for what is rounded to bfloat16 then) of degree 4, below 5e-5.
template <bool ROUGH>
static inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(number(88.0f), _mm512_max_ps(number(-80.0f), x));  // in this order what is no number stays none
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, number(1.44269504088896f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, number(0.693145751953125f), x);
    r = _mm512_fnmadd_ps(n, number(1.42860682030941723212e-6f), r);
    __m512 p = number(1.0f / 24);
    if (!ROUGH) {
        p = _mm512_fmadd_ps(number(1.0f / 720), r, number(1.0f / 120));
        p = _mm512_fmadd_ps(p, r, number(1.0f / 24));
    }
    p = _mm512_fmadd_ps(p, r, number(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, number(0.5f));
    p = _mm512_fmadd_ps(p, r, number(1.0f));
    p = _mm512_fmadd_ps(p, r, number(1.0f));
    return _mm512_scalef_ps(p, n);
}

constexpr uintptr_t LARGE_PAGE = 2 << 20;

// Ask for large pages, of which the CPU need look up few: large layers are 10 to 20 % faster.
static inline void large_pages(void *memory, size_t bytes) {
    const uintptr_t begin = ((uintptr_t)memory + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    const uintptr_t end = ((uintptr_t)memory + bytes) / LARGE_PAGE * LARGE_PAGE;
    if (begin < end) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
}

// Memory of this thread's own that grows, is used again, and goes with the thread. `which` names one of a few.
struct Scratch {
    static constexpr int COUNT = 4;
    void *kept[COUNT];
    size_t sizes[COUNT];

    static void release(void *scratch) {
        for (void *memory : ((Scratch *)scratch)->kept) free(memory);
        free(scratch);
    }

    static Scratch *of_this_thread() {
        static pthread_key_t key;
        static pthread_once_t once = PTHREAD_ONCE_INIT;
        static thread_local Scratch *mine;
        if (!mine) {
            pthread_once(&once, [] { pthread_key_create(&key, release); });
            mine = (Scratch *)calloc(1, sizeof(Scratch));
            if (!mine) abort();
            pthread_setspecific(key, mine);
        }
        return mine;
    }
};

static inline void *scratch(int which, size_t bytes) {
    Scratch *mine = Scratch::of_this_thread();
    if (mine->sizes[which] < bytes) {
        free(mine->kept[which]);
        const size_t page = bytes < LARGE_PAGE ? 65536 : LARGE_PAGE;
        mine->sizes[which] = (bytes + page - 1) / page * page;
        mine->kept[which] = aligned_alloc(page, mine->sizes[which]);
        if (!mine->kept[which]) abort();  // no memory: a worker that dies is replaced
        large_pages(mine->kept[which], mine->sizes[which]);
    }
    return mine->kept[which];
}
