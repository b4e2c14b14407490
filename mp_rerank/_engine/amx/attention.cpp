// Attention within each pair of a row of tokens: products, softmax and products again while all of it is in the cache.
#include "tiles.h"

#include <algorithm>

namespace {

// The arrays `mp_attention` is given: for each segment so many numbers, and for each span of keys.
enum SegmentField { QUERY, QUERIES, POSITION, SPAN, SPANS, SEGMENT_FIELDS };
enum SpanField { BEGIN, COUNT, SPAN_FIELDS };

// 2^x on [0, 1] by a polynomial, from its highest power on.
constexpr float POWER_FIT[] = {0.07802452f, 0.22606716f, 0.69583354f, 0.99992522f};

long blocks_of(long count) { return tiles_of(count, BLOCK); }

// 2^x of 16 numbers, relative error below 8e-5: for what is rounded to bfloat16 then.
__m512 rough_power(__m512 x) {
    __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    __m512 p = number(POWER_FIT[0]);
    for (int i = 1; i < 4; ++i) p = _mm512_fmadd_ps(p, part, number(POWER_FIT[i]));
    return _mm512_scalef_ps(p, x);
}

// One number of each of 16 vectors, in their order: all its numbers put together by `op`.
template <typename Op>
__m512 across(const __m512 *v, Op op) {
    __m512 a[8], b[4];
    for (int i = 0; i < 8; ++i)
        a[i] = op(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
    for (int i = 0; i < 4; ++i)
        b[i] = op(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; ++i) a[i] = op(_mm512_unpacklo_ps(b[i], b[i + 2]), _mm512_unpackhi_ps(b[i], b[i + 2]));
    __m512 all = op(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    return _mm512_shuffle_f32x4(all, all, 0xd8);  // rows 0, 8, 4, 12 were the first of the four lanes
}

// 16 rows of 16 pairs of numbers to 16 columns of them.
void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
        t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
        t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
        t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    }
    for (int j = 0; j < 8; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

// Numbers of shape (tokens, heads, width); those of a head follow one another.
template <typename Number>
struct States {
    Number *data;
    long token, head;  // how far the next one is

    Number *at(long which, long of_head) const { return data + which * token + of_head * head; }
};

struct Nothing {
    void step() {}
};

// Products of 32 rows and 32 columns; or of the first 16 rows alone, where there are no more.
template <int PARTS>
void multiply_block(const bf16 *rows, const bf16 *columns, long steps, float *sums, bool half) {
    if (!half) {
        Nothing nothing;
        begin_sums(nullptr);
        add_products<PARTS>(rows, columns, steps, nothing);
        store_sums(sums, Place::alone());
        return;
    }
    constexpr long PART = 2 * TILE;
    _tile_zero(0);
    _tile_zero(1);
    for (long k = 0; k < steps; ++k, rows += PART * PARTS, columns += PART * PARTS)
        for (int sum = PARTS - 1; sum >= 0; --sum)  // which parts are multiplied: those of the smallest products first
            for (int part = 0; part <= sum; ++part) {
                _tile_loadd(4, rows + part * PART, 64);
                load_columns(columns + (sum - part) * PART);
                multiply_upper();
            }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
}

template <typename Number>
struct Attention {
    static constexpr int PARTS = sizeof(Number) == 2 ? 1 : FLOAT_PARTS;
    static constexpr long STEP = 2 * TILE * PARTS;   // numbers of 32 rows or columns, 32 deep
    static constexpr long SUMS = BLOCK * BLOCK;      // of 32 rows and 32 columns

    States<const Number> query, key, value;
    States<Number> output;
    const long *segments, *spans;
    long group;          // heads of queries to one of keys
    long width;
    float scale;
    long before, after;  // a token attends to so many tokens before it, and after it

    // 32 rows, 32 numbers of each: as tiles of rows. Of `which` there are `count`; the other rows are zeros.
    void load_block(bf16 *to, const States<const Number> &states, const long *which, long count, long head, long from) const {
        const Number *source = states.data + head * states.head + from;
        const long here = width - from;
        const __mmask16 left = first(here), right = first(here - 16);
        const __mmask32 both = (uint32_t)right << 16 | left;
        for (long r = 0; r < count; ++r) {
            const Number *row = source + which[r] * states.token;
            __builtin_prefetch(row + states.head);  // the next head of this token, which is wanted next, from far memory
            if constexpr (PARTS == 1) {
                _mm512_store_si512(to + r * TILE_DEPTH, _mm512_maskz_loadu_epi16(both, row));
            } else {
                store_parts<PARTS>(to + r * TILE_DEPTH, 2 * TILE, load16(row, left));
                store_parts<PARTS>(to + r * TILE_DEPTH + 16, 2 * TILE, load16(row + 16, right));
            }
        }
        for (long part = 0; part < PARTS; ++part)
            for (long r = count; r < BLOCK; ++r) _mm512_store_si512(to + part * 2 * TILE + r * TILE_DEPTH, _mm512_setzero_si512());
    }

    // Tiles of columns of a block of keys: two numbers of a key side by side.
    static void lay_keys(bf16 *to, const bf16 *rows) {
        for (int tile = 0; tile < 2 * PARTS; ++tile, to += TILE, rows += TILE) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(rows + i * TILE_DEPTH);
            transpose(r);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * TILE_DEPTH, r[i]);
        }
    }

    // Tiles of columns of a block of values: the numbers of two tokens side by side.
    static void lay_values(bf16 *to, const bf16 *rows) {
        const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        for (int part = 0; part < PARTS; ++part, to += 2 * TILE, rows += 2 * TILE)
            for (int i = 0; i < 16; ++i) {
                __m512i one = _mm512_permutexvar_epi64(order, _mm512_load_si512(rows + 2 * i * TILE_DEPTH));
                __m512i two = _mm512_permutexvar_epi64(order, _mm512_load_si512(rows + (2 * i + 1) * TILE_DEPTH));
                _mm512_store_si512(to + i * TILE_DEPTH, _mm512_unpacklo_epi16(one, two));
                _mm512_store_si512(to + TILE + i * TILE_DEPTH, _mm512_unpackhi_epi16(one, two));
            }
    }

    // The exponentials of 16 rows of products, as rows for the products with values; returns 1 / the sum of each row.
    //
    // sums: of blocks of 32 keys; numbers of a row are at +0 and +256 of each.
    // low, high: keys that the first row attends to; of each next one the next, at most up to `limit`, from 0 on.
    template <bool BAND>
    __m512 soften(const float *sums, bf16 *to, long blocks, long low, long high, long limit) const {
        const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const long whole = BAND ? 0 : limit / BLOCK;  // blocks without a mask
        alignas(64) float largest[16];
        __m512 found[16];
        auto mask = [&](long row, long place) -> __mmask16 {
            const __m512i at = _mm512_add_epi32(places, _mm512_set1_epi32((int)place));
            if constexpr (!BAND) return _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32((int)limit));
            const __mmask16 from = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32((int)(low + row)));
            return _mm512_mask_cmplt_epi32_mask(from, at, _mm512_set1_epi32((int)std::min(high + row, limit)));
        };
        for (long r = 0; r < 16; ++r) {
            __m512 most = number(-3e38f);
            const float *from = sums + r * 16;
            long b = 0;
            for (; b < whole; ++b, from += SUMS)
                most = _mm512_max_ps(most, _mm512_max_ps(_mm512_load_ps(from), _mm512_load_ps(from + 256)));
            for (; b < blocks; ++b, from += SUMS) {
                most = _mm512_mask_max_ps(most, mask(r, b * BLOCK), most, _mm512_load_ps(from));
                most = _mm512_mask_max_ps(most, mask(r, b * BLOCK + 16), most, _mm512_load_ps(from + 256));
            }
            found[r] = most;
        }
        const float factor = PARTS == 1 ? scale * 1.44269504088896f : scale;
        _mm512_store_ps(largest, _mm512_mul_ps(across(found, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }),
                                               number(PARTS == 1 ? factor : 1.0f)));
        for (long r = 0; r < 16; ++r) {
            const __m512 most = number(largest[r]);
            auto power = [&](const float *at) {
                if constexpr (PARTS == 1)
                    return rough_power(_mm512_fmsub_ps(_mm512_load_ps(at), number(factor), most));
                else
                    return exponential<false>(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at), most), number(factor)));
            };
            auto store = [&](bf16 *target, __m512 one, __m512 two) {
                if constexpr (PARTS == 1) {
                    _mm512_store_si512(target, (__m512i)_mm512_cvtne2ps_pbh(two, one));
                } else {
                    store_parts<PARTS>(target, 2 * TILE, one);
                    store_parts<PARTS>(target + 16, 2 * TILE, two);
                }
            };
            __m512 all = _mm512_setzero_ps(), beside = _mm512_setzero_ps();
            const float *from = sums + r * 16;
            bf16 *target = to + r * TILE_DEPTH;
            long b = 0;
            for (; b < whole; ++b, from += SUMS, target += STEP) {
                const __m512 one = power(from), two = power(from + 256);
                all = _mm512_add_ps(all, one);
                beside = _mm512_add_ps(beside, two);
                store(target, one, two);
            }
            for (; b < blocks; ++b, from += SUMS, target += STEP) {
                const __m512 one = _mm512_maskz_mov_ps(mask(r, b * BLOCK), power(from));
                __m512 two = _mm512_setzero_ps();
                if (BAND || limit - b * BLOCK > 16) two = _mm512_maskz_mov_ps(mask(r, b * BLOCK + 16), power(from + 256));
                all = _mm512_add_ps(all, one);
                beside = _mm512_add_ps(beside, two);
                store(target, one, two);
            }
            found[r] = _mm512_add_ps(all, beside);
        }
        return _mm512_div_ps(number(1.0f), across(found, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }));
    }

    // 32 queries of a head, and the keys that they attend to.
    struct Block {
        long query, count, head;
        long blocks;            // times 32 keys
        long low, high, limit;  // keys that its first query attends to, of `limit`, from the first of the blocks on
        bool band;
        float *sums;
        const bf16 *values;     // of the first of the blocks
        long apart;             // how far the values' next 32 numbers are
    };

    // What one thread computes, block by block. Tiles take long, and so does memory that was just written: while tiles
    // multiply the queries of one block with its keys, vectors make exponentials of the block before, and the numbers of
    // the output of the one before that.
    struct Stream {
        const Attention &all;
        long depth, most;  // of numbers of a head, and of keys: times 32
        bf16 *keys, *values[2], *queries, *rows, *weights;  // values of two segments: one's last block may be pending
        float *sums[2], *answers;
        long item = 0, number = 0;
        Block softening, finishing;
        bool softens = false, finishes = false;
        alignas(64) float inverse[BLOCK];

        Stream(const Attention &attention, long most_keys) : all(attention), depth(blocks_of(all.width)), most(blocks_of(most_keys)) {
            char *memory = (char *)scratch(0, sizeof(bf16) * STEP * (depth * (3 * most + 1) + most + 1) + sizeof(float) * SUMS * (2 * most + depth));
            auto take = [&]<typename T>(T *&taken, long count) {
                taken = (T *)memory;
                memory += count * sizeof(T);
            };
            take(keys, STEP * depth * most);
            take(values[0], STEP * depth * most);
            take(values[1], STEP * depth * most);
            take(queries, STEP * depth);
            take(rows, STEP);
            take(weights, STEP * most);
            take(sums[0], SUMS * most);
            take(sums[1], SUMS * most);
            take(answers, SUMS * depth);
        }

        // All of one segment's queries, of the heads that share a head of keys.
        void attend(const long *segment, long key_head) {
            const long queries = segment[QUERIES], *span = all.spans + segment[SPAN] * SPAN_FIELDS;
            if (queries == 0) return;  // a pair without a token
            long keys = 0;
            for (long s = 0; s < segment[SPANS]; ++s) keys += span[s * SPAN_FIELDS + COUNT];
            lay_out(span, keys, key_head);
            for (long head = key_head * all.group; head < (key_head + 1) * all.group; ++head)
                for (long from = 0; from < queries; from += BLOCK) {
                    Block block = bounds(segment[POSITION] + from, std::min<long>(BLOCK, queries - from), keys);
                    block.query = segment[QUERY] + from;
                    block.head = head;
                    push(block);
                }
            ++item;
        }

        void push(const Block &block) {
            multiply_keys(block);
            flush();
            softening = block;
            softens = true;
        }

        void flush() {
            alignas(64) float next[BLOCK];
            if (softens) soften(softening, next);
            if (finishes) finish(finishing);
            finishes = softens;
            if (softens) {
                memcpy(inverse, next, sizeof next);
                multiply_values(softening);
                finishing = softening;
            }
            softens = false;
        }

        void lay_out(const long *span, long count, long head) {
            long which[BLOCK], in_span = 0;
            const long blocks = blocks_of(count);
            for (long b = 0; b < blocks; ++b) {
                const long here = std::min<long>(BLOCK, count - b * BLOCK);
                for (long r = 0; r < here; ++r) {
                    while (in_span == span[COUNT]) in_span = 0, span += SPAN_FIELDS;
                    which[r] = span[BEGIN] + in_span++;
                }
                for (long d = 0; d < depth; ++d) {
                    all.load_block(rows, all.key, which, here, head, d * BLOCK);
                    lay_keys(keys + (b * depth + d) * STEP, rows);
                    all.load_block(rows, all.value, which, here, head, d * BLOCK);
                    lay_values(values[item % 2] + (d * blocks + b) * STEP, rows);
                }
            }
        }

        // The keys of some queries, of which the first one has this position.
        Block bounds(long position, long count, long keys_count) {
            Block block;
            const long last = position + count - 1, high = std::min(keys_count, last + all.after + 1);
            const long from = std::max<long>(0, position - all.before) / BLOCK;
            block.count = count;
            block.blocks = blocks_of(high) - from;
            block.low = position - all.before - from * BLOCK;
            block.high = position + all.after + 1 - from * BLOCK;
            block.limit = keys_count - from * BLOCK;
            block.band = last > all.before || position + all.after + 1 < keys_count;
            block.sums = sums[number++ % 2];
            block.values = values[item % 2] + from * STEP;
            block.apart = blocks_of(keys_count) * STEP;
            return block;
        }

        void multiply_keys(const Block &block) {
            long which[BLOCK];
            for (long r = 0; r < BLOCK; ++r) which[r] = block.query + r;
            for (long d = 0; d < depth; ++d) all.load_block(queries + d * STEP, all.query, which, block.count, block.head, d * BLOCK);
            const bf16 *columns = keys + (block.values - values[item % 2]) * depth;
            for (long b = 0; b < block.blocks; ++b, columns += depth * STEP)
                multiply_block<PARTS>(queries, columns, depth, block.sums + b * SUMS, block.count <= 16);
        }

        void soften(const Block &block, float *inverse) {
            for (long half = 0; half < 2 && half * 16 < block.count; ++half) {
                const float *from = block.sums + half * 512;
                bf16 *to = weights + half * TILE;
                const long low = block.low + 16 * half, high = block.high + 16 * half;
                _mm512_store_ps(inverse + 16 * half,
                                block.band ? all.template soften<true>(from, to, block.blocks, low, high, block.limit)
                                           : all.template soften<false>(from, to, block.blocks, low, high, block.limit));
            }
        }

        void multiply_values(const Block &block) {
            for (long d = 0; d < depth; ++d)
                multiply_block<PARTS>(weights, block.values + d * block.apart, block.blocks, answers + d * SUMS, block.count <= 16);
        }

        void finish(const Block &block) {
            for (long d = 0; d < depth; ++d) {
                const __mmask16 left = first(all.width - d * BLOCK), right = first(all.width - d * BLOCK - 16);
                for (long r = 0; r < block.count; ++r) {
                    const float *from = answers + d * SUMS + r / 16 * 512 + r % 16 * 16;
                    Number *to = all.output.at(block.query + r, block.head) + d * BLOCK;
                    const __m512 one = _mm512_mul_ps(_mm512_load_ps(from), ::number(inverse[r]));
                    const __m512 two = _mm512_mul_ps(_mm512_load_ps(from + 256), ::number(inverse[r]));
                    if (PARTS == 1 && right == 0xffff) {
                        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(two, one));
                    } else {
                        store16(to, left, one);
                        store16(to + 16, right, two);
                    }
                }
            }
        }
    };

    void run(long count, long key_heads, int threads) const {
        long most = 0;
        for (long segment = 0; segment < count; ++segment) {
            long keys = 0;
            for (long s = 0; s < segments[segment * SEGMENT_FIELDS + SPANS]; ++s)
                keys += spans[(segments[segment * SEGMENT_FIELDS + SPAN] + s) * SPAN_FIELDS + COUNT];
            most = std::max(most, keys);
        }
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            const unsigned control = _mm_getcsr();
            _mm_setcsr(control | 0x8040);  // numbers too small for float32's usual form are 0: they would take long
            begin_tiles();
            Stream stream(*this, most);
#pragma omp for schedule(dynamic, 1) collapse(2)
            for (long segment = 0; segment < count; ++segment)
                for (long head = 0; head < key_heads; ++head) stream.attend(segments + segment * SEGMENT_FIELDS, head);
            stream.flush();
            stream.flush();
            end_tiles();
            _mm_setcsr(control);
        }
    }
};

}  // namespace

extern "C" {

// Attention of each segment's queries to its keys.
//
// query, key, value, output: numbers of shape (tokens, heads, width), float32 (`wide`) or bfloat16. `strides` says how
//     far the next token and the next head of each of the four are; the numbers of one head follow one another.
// segments: of shape (count, 5): a segment's first query, and how many there are; the first one's position among the
//     keys; its first span, and how many there are.
// spans: of shape (spans, 2): a span's first key, and how many there are. A segment's keys are those of its spans.
// before, after: a query attends to so many keys before its position, and after it. Its own is always one of them.
void mp_attention(const void *query, const void *key, const void *value, void *output, const long *strides,
                  const long *segments, long count, const long *spans, long heads, long key_heads, long width,
                  float scale, long before, long after, int wide, int threads) {
    auto run = [&]<typename Number>(Number) {
        Attention<Number>{{(const Number *)query, strides[0], strides[1]}, {(const Number *)key, strides[2], strides[3]},
                          {(const Number *)value, strides[4], strides[5]}, {(Number *)output, strides[6], strides[7]},
                          segments, spans, heads / key_heads, width, scale, before, after}
            .run(count, key_heads, threads);
    };
    if (wide) run(float());
    else run(bf16());
}
}
