// Linear layers: products of hidden states and a weight that was packed into tiles once, and what follows them.
#include "tiles.h"

#include <algorithm>

namespace {

// What is done with a sum of products. `GATED`: of each 32 columns the first 16, after their activation, are multiplied with
// the other 16, so that the output is half as wide.
enum Then { PLAIN = 0, GELU = 1, GELU_TANH = 2, SILU = 3, ADD = 4, MULTIPLY = 5, GATED = 16 };

constexpr long CHUNK_ROWS = 256;   // that are packed at a time, at most
constexpr long ROW_BYTES = 4096;   // of a row that are packed at a time
constexpr long COLUMN_DEPTH = 384; // numbers of 32 columns that stay in the L1 cache

constexpr float GELU_FIT[] = {4.19733623e-11f,  -4.24891589e-09f, 1.90221471e-07f,  -5.00612759e-06f, 8.71172742e-05f,
                              -1.07138429e-03f, 9.69514251e-03f,  -6.61555827e-02f, 3.98802072e-01f};

// So that they and their part of the weight stay in the L2 cache, and each thread has some.
long rows_at_a_time(long rows, int threads) {
    const long chunks = std::max(tiles_of(rows, CHUNK_ROWS), std::min<long>(threads, tiles_of(rows, BLOCK)));
    return tiles_of(tiles_of(rows, chunks), BLOCK) * BLOCK;
}

// Functions of 16 numbers, as exact as float32 is, or (`ROUGH`) as bfloat16 is.

// 1 / x. The CPU gives 14 bits; a step of Newton's method doubles them.
template <bool ROUGH>
__m512 inverse(__m512 x) {
    __m512 y = _mm512_rcp14_ps(x);
    return ROUGH ? y : _mm512_fmadd_ps(y, _mm512_fnmadd_ps(x, y, number(1.0f)), y);
}

// gelu(x) = x / 2 * (1 + erf(x / sqrt 2)). Exact: by Abramowitz and Stegun's 7.1.26, |error of erf| <= 1.5e-7. Rough:
// x * (1 / 2 + x * q(x^2)), where q is fitted so that |error| <= 4e-5 up to x = 8, and relative to x > 0 6e-5.
template <bool ROUGH>
__m512 gelu(__m512 x) {
    if (ROUGH) {
        x = _mm512_max_ps(number(-4.3f), x);  // in this order what is no number stays none
        __m512 near = _mm512_min_ps(x, number(4.3f)), square = _mm512_mul_ps(near, near);
        __m512 q = number(GELU_FIT[0]);
        for (int i = 1; i < 9; ++i) q = _mm512_fmadd_ps(q, square, number(GELU_FIT[i]));
        return _mm512_mul_ps(x, _mm512_fmadd_ps(near, q, number(0.5f)));
    }
    __m512 size = _mm512_abs_ps(_mm512_mul_ps(x, number(0.70710678118654752f)));
    __m512 t = inverse<false>(_mm512_fmadd_ps(size, number(0.3275911f), number(1.0f)));
    __m512 p = number(0.5f * 1.061405429f);
    p = _mm512_fmadd_ps(p, t, number(0.5f * -1.453152027f));
    p = _mm512_fmadd_ps(p, t, number(0.5f * 1.421413741f));
    p = _mm512_fmadd_ps(p, t, number(0.5f * -0.284496736f));
    p = _mm512_fmadd_ps(p, t, number(0.5f * 0.254829592f));
    __m512 half = _mm512_mul_ps(_mm512_mul_ps(p, t), exponential<false>(_mm512_mul_ps(_mm512_mul_ps(x, x), number(-0.5f))));
    // Where x > 0 it is x * (1 - half), elsewhere x * half: nothing cancels out.
    __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OS);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(half, positive, number(1.0f), half));
}

// x / (1 + e^-y): of y = x it is silu, of y = 2 z gelu by its approximation x / 2 * (1 + tanh z).
template <bool ROUGH>
__m512 sigmoid_times(__m512 x, __m512 y) {
    __m512 power = exponential<ROUGH>(_mm512_sub_ps(_mm512_setzero_ps(), y));
    return _mm512_mul_ps(x, inverse<ROUGH>(_mm512_add_ps(number(1.0f), power)));
}

template <bool ROUGH>
__m512 gelu_tanh(__m512 x) {
    __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), number(0.044715f), number(1.0f));
    return sigmoid_times<ROUGH>(x, _mm512_mul_ps(_mm512_mul_ps(x, cubic), number(2 * 0.79788456080286536f)));
}

// `TO_TILES`: the output is laid out as another layer's input.
template <typename Number, Then THEN, bool TO_TILES = false>
struct Layer {
    static constexpr int PARTS = sizeof(Number) == 2 ? 1 : FLOAT_PARTS;
    static constexpr int SHARE = THEN & GATED ? 2 : 1;  // of the columns that the output has, one in so many

    const Number *input;  // (rows, depth)
    const bf16 *weight;   // for each 32 columns and each 32 of depth: for each part two tiles
    const float *bias;    // for each column, up to a multiple of 32; null: there is none
    const Number *other;  // (rows, columns), or null
    Number *output;       // (rows, columns / SHARE); may be `other`
    long depth, columns;
    const bf16 *input_tiles = nullptr;  // instead of `input`: those rows that are computed at a time, as `pack_rows` makes them
    bf16 *output_tiles = nullptr;       // instead of `output`: the same, for another layer

    // Blocks of sums become numbers of the output while other sums are computed.
    struct Finishing {
        const Layer &layer;
        const float *sums = nullptr;
        long next = 0, rows = 0, each = 0, place = 0, each_lines = 0;
        const long apart = TO_TILES ? TILE_DEPTH : layer.columns / SHARE;  // how far the next row is
        const char *coming = nullptr;
        const Number *written = nullptr;
        long unwritten = 0, each_written = 0;
        __mmask16 left = 0, right = 0;

        void begin(const float *block, long at, long count, long column, long steps) {
            rest();
            sums = block;
            next = 0;
            rows = count;
            each = tiles_of(count, steps);
            place = at;
            left = first(layer.columns - column);
            right = first(layer.columns - column - 16);
        }

        // Let the weight of the next columns come into the L2 cache meanwhile.
        void expect(const bf16 *weight, long lines) {
            coming = (const char *)weight;
            each_lines = lines;
        }

        // Let those lines of the output come into the L1 cache that the sums computed meanwhile will be written to: a store
        // that waits for memory holds up the loads of tiles behind it.
        void expect_output(long at, long count, long steps) {
            written = layer.output + at;
            unwritten = count;
            each_written = tiles_of(count, steps);
        }

        void step() {
            for (const long until = std::max<long>(0, unwritten - each_written); unwritten > until; --unwritten) {
                for (long i = 0; i < BLOCK / SHARE; i += 64 / sizeof(Number)) __builtin_prefetch(written + i, 1);
                written += layer.columns / SHARE;
            }
            for (long i = 0; i < each_lines; ++i, coming += 64) _mm_prefetch(coming, _MM_HINT_T1);
            for (const long until = next + each < rows ? next + each : rows; next < until; ++next) one();
        }

        void rest() {
            for (; next < rows; ++next) one();
        }

        void one() const {
            const float *from = sums + next * 16 + (next & 16) * 16;  // of the lower tiles from row 16 on
            const long at = place + next * apart;
            __m512 one = _mm512_load_ps(from), two = _mm512_load_ps(from + 256);
            if constexpr (THEN & GATED) {
                one = _mm512_mul_ps(value(one, at, left), two);
                if constexpr (TO_TILES) store_parts<PARTS>(layer.output_tiles + at, 2 * TILE, one);
                else store16(layer.output + at, 0xffff, one);
                return;
            }
            one = value(one, at, left);
            two = value(two, at + 16, right);
            if constexpr (TO_TILES && PARTS == 1) {
                _mm512_store_si512(layer.output_tiles + at, (__m512i)_mm512_cvtne2ps_pbh(two, one));
            } else if constexpr (TO_TILES) {
                store_parts<PARTS>(layer.output_tiles + at, 2 * TILE, one);
                store_parts<PARTS>(layer.output_tiles + at + 16, 2 * TILE, two);
            } else if (PARTS == 1 && right == 0xffff) {
                _mm512_storeu_si512(layer.output + at, (__m512i)_mm512_cvtne2ps_pbh(two, one));
            } else {
                store16(layer.output + at, left, one);
                store16(layer.output + at + 16, right, two);
            }
        }

        __m512 value(__m512 x, long at, __mmask16 mask) const {
            constexpr bool ROUGH = PARTS == 1;
            constexpr int ACTIVATION = THEN & ~GATED;
            if constexpr (ACTIVATION == GELU) return gelu<ROUGH>(x);
            if constexpr (ACTIVATION == GELU_TANH) return gelu_tanh<ROUGH>(x);
            if constexpr (ACTIVATION == SILU) return sigmoid_times<ROUGH>(x, x);
            if constexpr (THEN == ADD) return _mm512_add_ps(x, load16(layer.other + at, mask));
            if constexpr (THEN == MULTIPLY) return _mm512_mul_ps(x, load16(layer.other + at, mask));
            return x;
        }
    };

    // Where in the output the sums of a row and a column are.
    long place(long row, long column) const { return (row * columns + column) / SHARE; }

    // The same in the output's tiles: of a block of 32 rows, the first one.
    long place_in_tiles(long block, long column) const {
        const long of_output = column / SHARE;
        return (block * tiles_of(columns / SHARE, TILE_DEPTH) + of_output / TILE_DEPTH) * 2 * TILE * PARTS + of_output % TILE_DEPTH;
    }

    // Rows as tiles: for each 32 rows and each 32 of depth, for each part two tiles.
    void pack_rows(bf16 *to, long row, long rows, long from, long until) const {
        for (long block = 0; block < rows; block += BLOCK)
            for (long k = from; k < until; k += TILE_DEPTH, to += 2 * TILE * PARTS)
                for (long r = 0; r < BLOCK; ++r) {
                    const Number *source = input + (row + block + r) * depth + k;
                    const long here = block + r < rows ? until - k : 0;
                    bf16 *target = to + r * TILE_DEPTH;
                    if constexpr (PARTS == 1) {
                        const __mmask32 mask = here >= 32 ? 0xffffffffu : (1u << here) - 1;
                        _mm512_store_si512(target, _mm512_maskz_loadu_epi16(mask, source));
                    } else {
                        store_parts<PARTS>(target, 2 * TILE, load16(source, first(here)));
                        store_parts<PARTS>(target + 16, 2 * TILE, load16(source + 16, first(here - 16)));
                    }
                }
    }

    // Some rows of the output, at most CHUNK_ROWS, and of them the blocks of columns from `begin` to `end`.
    void compute(long row, long rows, long begin, long end) const {
        constexpr long deep = ROW_BYTES / (long)sizeof(bf16) / PARTS / COLUMN_DEPTH * COLUMN_DEPTH;
        const long all_steps = tiles_of(depth, TILE_DEPTH), blocks = tiles_of(rows, BLOCK), size = BLOCK * BLOCK;
        const bool at_once = depth <= deep;
        bf16 *packed = (bf16 *)scratch(0, sizeof(bf16) * PARTS * blocks * BLOCK * std::min(deep, all_steps * TILE_DEPTH));
        // The block before is still being finished when the next one's sums are begun.
        float *sums = (float *)scratch(1, sizeof(float) * size * (at_once ? blocks + 1 : blocks * (end - begin)));
        Finishing finishing{*this};
        for (long from = 0; from < depth; from += deep) {
            const long until = std::min(depth, from + deep), steps = tiles_of(until - from, TILE_DEPTH);
            const long step = tiles_of(steps, tiles_of(until - from, COLUMN_DEPTH));
            const bf16 *tiles = input_tiles ? input_tiles + from / TILE_DEPTH * 2 * TILE * PARTS : packed;
            const long block_apart = (input_tiles ? all_steps : steps) * 2 * TILE * PARTS;
            if (!input_tiles) pack_rows(packed, row, rows, from, until);
            for (long n = begin; n < end; ++n) {
                finishing.expect(weight + ((n + 1) * all_steps + from / TILE_DEPTH) * 2 * TILE * PARTS,
                                 n + 1 < end ? tiles_of(BLOCK * PARTS, blocks) : 0);
                const bf16 *panel = weight + (n * all_steps + from / TILE_DEPTH) * 2 * TILE * PARTS;
                for (long k = 0; k < steps; k += step)
                    for (long m = 0; m < blocks; ++m) {
                        const long number = (n - begin) * blocks + m;
                        float *here = sums + (at_once ? number % (blocks + 1) : number) * size;
                        const long some = std::min(step, steps - k);
                        const bool last = until == depth && k + step >= steps;
                        const long first_row = row + m * BLOCK, count = std::min<long>(BLOCK, rows - m * BLOCK);
                        const long at = place(first_row, n * BLOCK);
                        // Sums that are float32 numbers of the output need no finishing.
                        const bool whole = PARTS > 1 && count == BLOCK && (n + 1) * BLOCK <= columns;
                        const bool direct = whole && !TO_TILES && (THEN == PLAIN || (THEN == ADD && !bias));
                        if (from + k) load_sums(here, Place::alone());
                        else if (direct && THEN == ADD) load_sums((const float *)other + at, Place::within(columns));
                        else begin_sums(bias ? bias + n * BLOCK : nullptr);
                        if (last && !TO_TILES) finishing.expect_output(at, count, some);
                        add_products<PARTS>(tiles + m * block_apart + k * 2 * TILE * PARTS, panel + k * 2 * TILE * PARTS, some,
                                            finishing);
                        if (last && direct) {
                            store_sums((float *)output + at, Place::within(columns));
                        } else {
                            store_sums(here, Place::alone());
                            if (last && TO_TILES) finishing.begin(here, place_in_tiles(m, n * BLOCK), BLOCK, n * BLOCK, some);
                            else if (last) finishing.begin(here, at, count, n * BLOCK, some);
                        }
                    }
            }
        }
        finishing.rest();
    }

    void run(long rows, int threads) const {
        if (rows == 0) return;
        const long each = rows_at_a_time(rows, threads), chunks = tiles_of(rows, each);
        const long blocks = tiles_of(columns, BLOCK), stripes = std::min(blocks, std::max<long>(1, threads / chunks));
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(threads) if (threads > 1)
        for (long chunk = 0; chunk < chunks; ++chunk)
            for (long stripe = 0; stripe < stripes; ++stripe) {
                const long row = chunk * each;
                begin_tiles();
                compute(row, std::min(each, rows - row), blocks * stripe / stripes, blocks * (stripe + 1) / stripes);
                end_tiles();
            }
    }
};

// Call `work` for some rows after the others, with memory for so many tiles of each 32 of them.
template <typename Work>
void by_chunks(long rows, long tiles, int threads, Work work) {
    const long each = rows_at_a_time(rows, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row += each) {
        bf16 *kept = (bf16 *)scratch(2, sizeof(bf16) * tiles_of(each, BLOCK) * tiles * TILE);
        begin_tiles();
        work(row, std::min(each, rows - row), kept);
        end_tiles();
    }
}

// A layer, and another one of its output: what is between them is used again before it leaves the caches.
template <typename Number, Then UP, Then DOWN>
void feed_forward(const Layer<Number, UP, true> &up, const Layer<Number, DOWN> &down, long rows, int threads) {
    const long tiles = 2 * tiles_of(down.depth, TILE_DEPTH) * up.PARTS;
    by_chunks(rows, tiles, threads, [&](long row, long count, bf16 *between) {
        auto first = up;
        auto second = down;
        first.output_tiles = between;
        second.input_tiles = between;
        first.compute(row, count, 0, tiles_of(up.columns, BLOCK));
        second.compute(row, count, 0, tiles_of(down.columns, BLOCK));
    });
}

// Layers with one input, which is packed once.
template <typename Number>
void side_by_side(const Layer<Number, PLAIN> *layers, long count, long rows, int threads) {
    const long depth = layers->depth, tiles = 2 * tiles_of(depth, TILE_DEPTH) * layers->PARTS;
    by_chunks(rows, tiles, threads, [&](long row, long some, bf16 *packed) {
        layers->pack_rows(packed, row, some, 0, depth);
        for (long i = 0; i < count; ++i) {
            auto layer = layers[i];
            layer.input_tiles = packed;
            layer.compute(row, some, 0, tiles_of(layer.columns, BLOCK));
        }
    });
}

template <typename Number>
void pack(const Number *weight, bf16 *packed, long columns, long depth, int threads) {
    constexpr int PARTS = sizeof(Number) == 2 ? 1 : FLOAT_PARTS;
    const long steps = tiles_of(depth, TILE_DEPTH);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long n = 0; n < tiles_of(columns, BLOCK); ++n)
        for (long k = 0; k < steps; ++k) {
            alignas(64) bf16 parts[FLOAT_PARTS][16];
            for (long c = 0; c < BLOCK; ++c)
                for (long half = 0; half < 2; ++half) {
                    const long column = n * BLOCK + c, from = k * TILE_DEPTH + 16 * half;
                    const long here = column < columns ? depth - from : 0;
                    if constexpr (PARTS == 1) {
                        _mm256_store_si256((__m256i *)parts[0], _mm256_maskz_loadu_epi16(first(here), weight + column * depth + from));
                    } else {
                        store_parts<PARTS>(parts[0], 16, load16(weight + column * depth + from, first(here)));
                    }
                    // Two numbers of depth side by side, for each of 16 columns: so a tile of columns is laid out.
                    for (int part = 0; part < PARTS; ++part) {
                        bf16 *tile = packed + (((n * steps + k) * PARTS + part) * 2 + c / 16) * TILE;
                        for (long i = 0; i < 16; i += 2)
                            memcpy(tile + (8 * half + i / 2) * 32 + c % 16 * 2, parts[part] + i, 4);
                    }
                }
        }
}

// Call what is made for these numbers, and for what is done with sums of products.
template <typename Work>
void by_kind(int wide, int then, Work work) {
    auto of = [&]<typename Number>(Number) {
        switch (then) {
            case GELU: return work.template operator()<Number, GELU>();
            case GELU_TANH: return work.template operator()<Number, GELU_TANH>();
            case SILU: return work.template operator()<Number, SILU>();
            case ADD: return work.template operator()<Number, ADD>();
            case MULTIPLY: return work.template operator()<Number, MULTIPLY>();
            case GATED | GELU: return work.template operator()<Number, (Then)(GATED | GELU)>();
            case GATED | GELU_TANH: return work.template operator()<Number, (Then)(GATED | GELU_TANH)>();
            case GATED | SILU: return work.template operator()<Number, (Then)(GATED | SILU)>();
            default: return work.template operator()<Number, PLAIN>();
        }
    };
    if (wide) of(float());
    else of(bf16());
}

}  // namespace

extern "C" {

// Bytes of a packed weight.
long mp_packed_bytes(long columns, long depth, int wide) {
    return tiles_of(columns, BLOCK) * tiles_of(depth, TILE_DEPTH) * 2 * TILE * (wide ? FLOAT_PARTS : 1) * (long)sizeof(bf16);
}

// Pack a weight of shape (columns, depth), of float32 numbers (`wide`) or of bfloat16.
void mp_pack(const void *weight, bf16 *packed, long columns, long depth, int wide, int threads) {
    large_pages(packed, mp_packed_bytes(columns, depth, wide));
    if (wide) pack((const float *)weight, packed, columns, depth, threads);
    else pack((const bf16 *)weight, packed, columns, depth, threads);
}

// output = then(input . weight^T + bias), with `other` where that is a sum or a product. A gated one has a multiple of 32
// columns.
void mp_linear(const void *input, const bf16 *weight, const float *bias, const void *other, void *output, long rows,
               long depth, long columns, int wide, int then, int threads) {
    by_kind(wide, then, [&]<typename Number, Then THEN>() {
        Layer<Number, THEN>{(const Number *)input, weight, bias, (const Number *)other, (Number *)output, depth, columns}
            .run(rows, threads);
    });
}

// output = then(input . up^T + up_bias) . down^T + down_bias, and `other`, if there is one. `inner` is the number of columns
// between the two, a multiple of 32; a gated `up` has twice as many.
void mp_feed_forward(const void *input, const bf16 *up, const float *up_bias, const bf16 *down, const float *down_bias,
                     const void *other, void *output, long rows, long depth, long inner, long columns, int wide, int then,
                     int threads) {
    by_kind(wide, then, [&]<typename Number, Then THEN>() {
        auto run = [&]<Then DOWN>() {
            feed_forward(Layer<Number, THEN, true>{(const Number *)input, up, up_bias, nullptr, nullptr, depth, THEN & GATED ? 2 * inner : inner},
                         Layer<Number, DOWN>{nullptr, down, down_bias, (const Number *)other, (Number *)output, inner, columns},
                         rows, threads);
        };
        if (other) run.template operator()<ADD>();
        else run.template operator()<PLAIN>();
    });
}

// Outputs of up to 4 plain layers with one input.
void mp_side_by_side(const void *input, const bf16 *const *weights, const float *const *biases, void *const *outputs,
                     const long *columns, long count, long rows, long depth, int wide, int threads) {
    by_kind(wide, PLAIN, [&]<typename Number, Then THEN>() {
        Layer<Number, PLAIN> layers[4];
        for (long i = 0; i < count; ++i)
            layers[i] = {(const Number *)input, weights[i], biases[i], nullptr, (Number *)outputs[i], depth, columns[i]};
        side_by_side(layers, count, rows, threads);
    });
}
}
