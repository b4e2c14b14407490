// What stands between linear layers and attention: norms of rows, and rotary positions, in one pass over memory each.
#include "tiles.h"

namespace {

constexpr long NUMBERS_FOR_THREADS = 65536;  // fewer are computed sooner than other threads are woken

// All threads or one: GCC's OpenMP ends those that a smaller team has no use for, and starts them again for the next.
int threads_for(long numbers, int threads) { return numbers < NUMBERS_FOR_THREADS ? 1 : threads; }

// Each row less its mean (`CENTRED`: a layer norm; otherwise an RMS norm), divided by its root mean square.
template <typename Number, bool CENTRED, bool ADDED>
struct Norm {
    const Number *input;   // (rows, width)
    const Number *other;   // is added to it first
    const float *weight;   // (width)
    const float *bias;     // (width), or null
    Number *sum;           // (rows, width), if other is added; may be `input` or `other`
    Number *output;        // (rows, width)
    long width;
    float epsilon;
    float share = 1.0f / width;

    void row(long place, float *kept) const {
        const Number *from = input + place * width, *added = other + place * width;
        Number *sums = sum + place * width, *to = output + place * width;
        __m512 totals[CHAINS] = {}, squares[CHAINS] = {};
        each16([&](long k, __mmask16 mask, int chain) {
            __m512 x = load16(from + k, mask);
            if constexpr (ADDED) {
                x = _mm512_add_ps(x, load16(added + k, mask));
                store16(sums + k, mask, x);
            }
            _mm512_store_ps(kept + k, x);
            if constexpr (CENTRED) totals[chain] = _mm512_add_ps(totals[chain], x);
            else squares[chain] = _mm512_fmadd_ps(x, x, squares[chain]);
        });
        const __m512 mean = number(CENTRED ? mean_of(totals) : 0.0f);
        if constexpr (CENTRED)  // of numbers less their mean: squares of the numbers would cancel out
            each16([&](long k, __mmask16 mask, int chain) {
                const __m512 x = _mm512_maskz_sub_ps(mask, _mm512_load_ps(kept + k), mean);
                squares[chain] = _mm512_fmadd_ps(x, x, squares[chain]);
            });
        const __m512 scale = number(1.0f / __builtin_sqrtf(mean_of(squares) + epsilon));
        each16([&](long k, __mmask16 mask, int) {
            const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(kept + k), mean), scale);
            const __m512 scaled = _mm512_mul_ps(x, load16(weight + k, mask));
            store16(to + k, mask, bias ? _mm512_add_ps(scaled, load16(bias + k, mask)) : scaled);
        });
    }

    // A sum waits for the one before it, so there are a few, computed in turn.
    static constexpr int CHAINS = 4;

    template <typename Work>
    __attribute__((always_inline)) void each16(Work work) const {
        long k = 0;
        for (; k + 16 * CHAINS <= width; k += 16 * CHAINS) {
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; ++chain) work(k + 16 * chain, 0xffff, chain);
        }
        for (; k < width; k += 16) work(k, first(width - k), 0);
    }

    float mean_of(const __m512 *sums) const {
        return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]))) * share;
    }

    void run(long rows, int threads) const {
        threads = threads_for(rows * width, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            float *kept = (float *)scratch(0, sizeof(float) * (width + 16));
#pragma omp for schedule(static)
            for (long place = 0; place < rows; ++place) row(place, kept);
        }
    }
};

// Heads of a layer's queries or keys, turned in place.
template <typename Number>
struct Heads {
    Number *states;
    long count, head_apart, token_apart;  // distances in numbers

    // 16 numbers of the first half of each head of a token, and those as far into the second half.
    void turn(long token, long k, long half, __mmask16 mask, __m512 cos, __m512 sin, __m512 second_cos, __m512 second_sin) const {
        Number *at = states + token * token_apart + k;
        for (long head = 0; head < count; ++head, at += head_apart) {
            const __m512 x = load16(at, mask), y = load16(at + half, mask);
            store16(at, mask, _mm512_fmsub_ps(x, cos, _mm512_mul_ps(y, sin)));
            store16(at + half, mask, _mm512_fmadd_ps(y, second_cos, _mm512_mul_ps(x, second_sin)));
        }
    }
};

template <typename Number>
void rotate(Heads<Number> queries, Heads<Number> keys, const Number *cos, const Number *sin, long tokens, long width, int threads) {
    const long half = width / 2;
    threads = threads_for(tokens * width * (queries.count + keys.count), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long token = 0; token < tokens; ++token)
        for (long k = 0; k < half; k += 16) {
            const __mmask16 mask = first(half - k);
            const Number *c = cos + token * width + k, *s = sin + token * width + k;
            const __m512 one = load16(c, mask), two = load16(s, mask), three = load16(c + half, mask), four = load16(s + half, mask);
            queries.turn(token, k, half, mask, one, two, three, four);
            keys.turn(token, k, half, mask, one, two, three, four);
        }
}

}  // namespace

extern "C" {

// output = weight * normal(input) + bias, row by row; with `other`, of sum = input + other. `centred`: a layer norm,
// otherwise an RMS norm. All but weight and bias of float32 numbers (`wide`) or of bfloat16.
void mp_norm(const void *input, const void *other, const float *weight, const float *bias, void *sum, void *output,
             long rows, long width, float epsilon, int centred, int wide, int threads) {
    auto run = [&]<typename Number, bool CENTRED, bool ADDED>() {
        Norm<Number, CENTRED, ADDED>{(const Number *)input, (const Number *)other, weight, bias, (Number *)sum, (Number *)output, width, epsilon}
            .run(rows, threads);
    };
    auto of = [&]<typename Number>(Number) {
        if (other) centred ? run.template operator()<Number, true, true>() : run.template operator()<Number, false, true>();
        else centred ? run.template operator()<Number, true, false>() : run.template operator()<Number, false, false>();
    };
    if (wide) of(float());
    else of(bf16());
}

// Turn queries and keys by their tokens' positions, in place: x cos - y sin and y cos + x sin, where x and y are the first
// and the second half of a head.
//
// queries, keys: shape (heads, tokens, width), at these distances in numbers; those of a head are adjoining.
// cos, sin: shape (tokens, width).
void mp_rotate(void *queries, long query_heads, long query_head_apart, long query_token_apart, void *keys, long key_heads,
               long key_head_apart, long key_token_apart, const void *cos, const void *sin, long tokens, long width,
               int wide, int threads) {
    auto run = [&]<typename Number>(Number) {
        rotate<Number>({(Number *)queries, query_heads, query_head_apart, query_token_apart},
                       {(Number *)keys, key_heads, key_head_apart, key_token_apart}, (const Number *)cos,
                       (const Number *)sin, tokens, width, threads);
    };
    if (wide) run(float());
    else run(bf16());
}
}
