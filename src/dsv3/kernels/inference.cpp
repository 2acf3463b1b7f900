// A block of the network for new tokens against their cache, on CPUs that multiply bfloat16 (AVX512-BF16); called
// through ctypes by inference.py.
//
// Everything rests on two products, both straight from torch's row-major matrices:
//   dot_panel   x . row for 16 rows at a time, which are transposed in registers as they come: the shuffles run on a
//               port that the multiplications leave free, so this costs nothing from about 4 rows of x on;
//   mix         a weighted sum of rows, neighbouring rows interleaved in registers.
// Each number of a result is added up in one order, pair of terms after pair of terms, which depends neither on the
// other rows of x nor on their number or the number of threads. So what is computed for a token is the same bits
// whatever else is in the batch, however its prompt was cut, and on any number of threads.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 64;  // cached tokens to a block
constexpr int64_t PAIR_ROW = 2 * LANES;

// sum += w * the two numbers at `pair`, which every lane gets. Broadcasting them within the multiplication would be one
// instruction less, and half as fast (Zen 4).
inline void add_products(__m512& sum, __m512i w, const bf16* pair) {
    int bits;
    std::memcpy(&bits, pair, sizeof bits);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(bits));
}

// Rows so many bytes apart, of which 16 can be reached from four registers and a step.
struct Rows {
    const char *p0, *p4, *p8, *p12;
    int64_t step, step3;

    Rows(const bf16* first, int64_t stride)
        : p0((const char*)first), p4(p0 + 8 * stride), p8(p0 + 16 * stride), p12(p0 + 24 * stride), step(2 * stride),
          step3(6 * stride) {}
    inline const bf16* operator[](int i) const {
        const char* four = i < 4 ? p0 : i < 8 ? p4 : i < 12 ? p8 : p12;
        const int64_t on = i % 4 == 0 ? 0 : i % 4 == 1 ? step : i % 4 == 2 ? 2 * step : step3;
        return (const bf16*)(four + on);
    }
    // On to the next columns. The compiler would rather keep an address for each row, and then run out of registers.
    inline void advance(int64_t columns) {
        for (const char** p : {&p0, &p4, &p8, &p12}) *p += columns * int64_t(sizeof(bf16));
        asm("" : "+r"(p0), "+r"(p4), "+r"(p8), "+r"(p12));
    }
};

// 16 numbers of each of two rows.
inline __m512i load_two(const bf16* a, const bf16* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)),
                              _mm256_loadu_si256((const __m256i*)b), 1);
}

// Sums of x . w for ROWS rows of x and 16 rows of w, w_stride apart: out[r * out_stride + row]. `in` is a multiple of
// 16. Rows of w that lie `ahead` numbers further on are fetched into the cache.
template <int ROWS>
inline void dot_tile(const bf16* x, int64_t x_stride, const bf16* w, int64_t w_stride, int64_t in, float* out,
                     int64_t out_stride, int64_t ahead) {
    __m512 sum[ROWS], other[ROWS];  // two, for a multiplication waits for the one before it in the same sum
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sum[r] = other[r] = _mm512_setzero_ps();
    Rows left(x, x_stride), right(w, w_stride);
    for (int64_t k = 0; k < in; k += LANES) {
        // Of rows 0-3 and 4-7 (then 8-11 and 12-15), in lanes 0 and 2: pair j; in lanes 1 and 3: pair 4 + j.
        __m512i quads[2][4];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const int at = 8 * i;
            const __m512i a = load_two(right[at], right[at + 4]), b = load_two(right[at + 1], right[at + 5]);
            const __m512i c = load_two(right[at + 2], right[at + 6]), d = load_two(right[at + 3], right[at + 7]);
            const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
            const __m512i ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
            quads[i][0] = _mm512_unpacklo_epi64(ab, cd);
            quads[i][1] = _mm512_unpackhi_epi64(ab, cd);
            quads[i][2] = _mm512_unpacklo_epi64(ab2, cd2);
            quads[i][3] = _mm512_unpackhi_epi64(ab2, cd2);
        }
        if (ahead && k % PAIR_ROW == 0)
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) _mm_prefetch((const char*)(right[i] + ahead), _MM_HINT_T1);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i low = _mm512_shuffle_i32x4(quads[0][j], quads[1][j], 0x88);
            const __m512i high = _mm512_shuffle_i32x4(quads[0][j], quads[1][j], 0xdd);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) add_products(sum[r], low, left[r] + 2 * j);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) add_products(other[r], high, left[r] + 8 + 2 * j);
        }
        left.advance(LANES);
        right.advance(LANES);
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) _mm512_storeu_ps(out + r * out_stride, _mm512_add_ps(sum[r], other[r]));
}

constexpr int64_t PASS = 8;  // rows of x that `dot` keeps sums for at once

// The same for up to PASS rows of x.
[[gnu::noinline]] void dot(const bf16* x, int64_t x_stride, int64_t rows, const bf16* w, int64_t w_stride, int64_t in,
                           float* out, int64_t out_stride, int64_t ahead) {
    switch (rows) {
        case 1: return dot_tile<1>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
        case 2: return dot_tile<2>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
        case 3: return dot_tile<3>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
        case 4: return dot_tile<4>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
        case 5: return dot_tile<5>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
        case 6: return dot_tile<6>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
        case 7: return dot_tile<7>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
        default: return dot_tile<8>(x, x_stride, w, w_stride, in, out, out_stride, ahead);
    }
}

// Calls use(first, count) for pieces of at most `most` of `rows` rows, of about equal size.
template <class Use>
inline void in_passes(int64_t rows, int64_t most, Use use) {
    const int64_t passes = (rows + most - 1) / most;
    for (int64_t p = 0; p < passes; p++) {
        const int64_t first = rows * p / passes;
        use(first, rows * (p + 1) / passes - first);
    }
}

// A matrix [out, in] as torch holds it. It is worked through in panels of 16 rows, which threads share out.
struct Matrix {
    const bf16* data;
    int64_t out, in;

    int64_t panels() const { return out / LANES; }

    // x @ the panel's rows, transposed: finish(row, sums) gets each row's 16 sums.
    template <class Finish>
    void multiply(const bf16* x, int64_t x_stride, int64_t rows, int64_t panel, Finish finish) const {
        in_passes(rows, PASS, [&](int64_t first, int64_t count) {
            alignas(64) float sums[PASS * LANES];
            dot(x + first * x_stride, x_stride, count, data + panel * LANES * in, in, in, sums, LANES,
                first ? 0 : LANES * in);
            for (int64_t r = 0; r < count; r++) finish(first + r, _mm512_load_ps(sums + r * LANES));
        });
    }

    // out [rows, this->out] = x @ the matrix transposed (+ bias), one panel of it.
    void multiply_into(bf16* to, const bf16* x, int64_t x_stride, int64_t rows, int64_t panel,
                       const bf16* bias = nullptr) const {
        multiply(x, x_stride, rows, panel, [&](int64_t row, __m512 sum) {
            if (bias) sum = _mm512_add_ps(sum, load(bias + panel * LANES));
            store(to + row * out + panel * LANES, sum);
        });
    }
};

// Columns 0 .. 15 and 16 .. 31 out of the order in which unpacking two rows leaves them.
inline __m512 straight(__m512 low, __m512 high, int half) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    return _mm512_permutex2var_ps(low, half ? second : first, high);
}

// sum = sum * scale[r] + the sum over i < count of weights[r][i] times row i of v, for ROWS sums of 32 * SPANS
// columns. In `sums` each 32 columns stand in the order of `straight`'s arguments. Without `scale` sums begin at zero.
// For every two rows one of those from `soon` on is fetched into the cache.
template <int ROWS, int SPANS>
inline void mix_tile(const bf16* weights, int64_t weights_stride, const bf16* v, int64_t v_stride, int64_t count,
                     float* sums, int64_t sums_stride, const float* scale, const bf16* soon) {
    __m512 sum[ROWS][SPANS][2];
    for (int r = 0; r < ROWS; r++)
        for (int s = 0; s < SPANS; s++)
            for (int h = 0; h < 2; h++)
                sum[r][s][h] = !scale ? _mm512_setzero_ps()
                                      : _mm512_mul_ps(_mm512_loadu_ps(sums + r * sums_stride + s * 32 + h * LANES),
                                                      _mm512_set1_ps(scale[r]));
    const auto add = [&](int64_t i, bool last) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int s = 0; s < SPANS; s++) {
            const __m512i a = _mm512_loadu_si512(v + i * v_stride + s * 32);
            const __m512i b = last ? _mm512_setzero_si512() : _mm512_loadu_si512(v + (i + 1) * v_stride + s * 32);
            const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                add_products(sum[r][s][0], low, weights + r * weights_stride + i);
                add_products(sum[r][s][1], high, weights + r * weights_stride + i);
            }
        }
    };
    int64_t i = 0;
    for (; i + 1 < count; i += 2) {
        add(i, false);
        if (soon)
            for (int64_t d = 0; d < v_stride; d += PAIR_ROW)
                _mm_prefetch((const char*)(soon + i / 2 * v_stride + d), _MM_HINT_T1);
    }
    if (i < count) add(i, true);  // the weight beside the last one meets a zero
    for (int r = 0; r < ROWS; r++)
        for (int s = 0; s < SPANS; s++)
            for (int h = 0; h < 2; h++) _mm512_storeu_ps(sums + r * sums_stride + s * 32 + h * LANES, sum[r][s][h]);
}

constexpr int64_t MIXED = 6;  // rows that `mix` keeps sums for at once

// The same for up to MIXED rows and any `columns`, a multiple of 32.
[[gnu::noinline]] void mix(const bf16* weights, int64_t weights_stride, int64_t rows, const bf16* v, int64_t v_stride,
                           int64_t count, float* sums, int64_t sums_stride, int64_t columns, const float* scale,
                           const bf16* soon) {
    for (int64_t c = 0; c < columns;) {
        const int64_t left = columns - c;
        const bf16* from = v + c;
        float* to = sums + c;
#define MIX(ROWS, SPANS)                                                                               \
    {                                                                                                  \
        mix_tile<ROWS, SPANS>(weights, weights_stride, from, v_stride, count, to, sums_stride, scale, \
                              c ? nullptr : soon);                                                     \
        c += 32 * SPANS;                                                                               \
    }
        if (left >= 256 && rows == 1) MIX(1, 8)
        else if (left >= 128 && rows == 1) MIX(1, 4)
        else if (left >= 128 && rows == 2) MIX(2, 4)
        else if (left >= 64)
            switch (rows) {
                case 1: MIX(1, 2) break;
                case 2: MIX(2, 2) break;
                case 3: MIX(3, 2) break;
                case 4: MIX(4, 2) break;
                case 5: MIX(5, 2) break;
                default: MIX(6, 2)
            }
        else
            switch (rows) {
                case 1: MIX(1, 1) break;
                case 2: MIX(2, 1) break;
                case 3: MIX(3, 1) break;
                case 4: MIX(4, 1) break;
                case 5: MIX(5, 1) break;
                default: MIX(6, 1)
            }
#undef MIX
    }
}

// Memory that a thread keeps from call to call, so that no page is touched for the first time every time.
class Scratch {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> data;
    size_t size = 0, used = 0;

public:
    // All that will be taken, in bytes; each part is rounded up to whole cache lines.
    void reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return;
        data.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        size = data ? bytes : 0;
        if (!data) throw std::bad_alloc();
    }
    template <class T>
    static size_t bytes(int64_t count) {
        return (size_t(count) * sizeof(T) + 63) / 64 * 64;
    }
    template <class T>
    T* take(int64_t count) {
        T* at = reinterpret_cast<T*>(static_cast<char*>(data.get()) + used);
        used += bytes<T>(count);
        return at;
    }
};

// Attention --------------------------------------------------------------------------------------------------------

}  // namespace

extern "C" {

// New tokens of several sequences, and where in the cache of 64-token blocks their sequences lie.
struct Batch {
    int64_t tokens;
    const int64_t *positions, *slots;  // [tokens]
    const int32_t *owners, *tables;    // [tokens]; [sequences, most_blocks]
    int64_t most_blocks;
    const float *cos, *sin;  // [tokens, rotary / 2]
    int64_t interleave;      // as in `rotate`
};

}

namespace {

constexpr int64_t TASK_ROWS = 64;  // heads of tokens that read a block of the cache together

// Attention over the cache for `tokens` tokens from `first` on, q [tokens, heads, dim] and out [tokens, heads, rank].
struct PagedAttention {
    const Batch& batch;
    const bf16* cache;
    const bf16* q;
    bf16* out;
    int64_t first, tokens, heads, dim, rank;
    float scale;
    std::vector<int32_t> order, starts;  // tokens, those that share blocks side by side; where each task's begin
    int64_t chunk, chunks;               // heads to a task; tasks for the heads of a token

    PagedAttention(const Batch& batch, const bf16* cache, const bf16* q, bf16* out, int64_t first, int64_t tokens,
                   int64_t heads, int64_t dim, int64_t rank, float scale)
        : batch(batch), cache(cache), q(q), out(out), first(first), tokens(tokens), heads(heads), dim(dim),
          rank(rank), scale(scale), order(tokens) {
        chunks = (heads + TASK_ROWS - 1) / TASK_ROWS;
        chunk = (heads + chunks - 1) / chunks;
        for (int64_t i = 0; i < tokens; i++) order[i] = int32_t(i);
        // Whoever shares any block shares the first one.
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return table(a)[0] < table(b)[0]; });
        for (int64_t i = 0; i < tokens; i++)
            if (!i || (i - starts.back() + 1) * chunk > TASK_ROWS || table(order[i])[0] != table(order[i - 1])[0])
                starts.push_back(int32_t(i));
    }
    const int32_t* table(int32_t token) const { return batch.tables + batch.owners[first + token] * batch.most_blocks; }
    int64_t tasks() const { return int64_t(starts.size()) * chunks; }

    // Heads `head` .. of some tokens, a row each. Blocks come one after the other; rows whose block is the same read
    // it together. Each row's maximum, sum and mixture grow from block to block in the order of its own context.
    void run(int64_t task) const {
        thread_local Scratch scratch;
        const int64_t part = task / chunks, head = task % chunks * chunk, width = std::min(chunk, heads - head);
        const int32_t* mine = &order[starts[part]];
        const int64_t count = (part + 1 < int64_t(starts.size()) ? starts[part + 1] : tokens) - starts[part];
        const int64_t rows = count * width;
        scratch.reserve(Scratch::bytes<bf16>(rows * dim) + Scratch::bytes<float>(rows * rank) +
                        Scratch::bytes<float>(rows * LANES) + 2 * Scratch::bytes<float>(rows) +
                        Scratch::bytes<float>(rows * BLOCK) + Scratch::bytes<bf16>(rows * BLOCK));
        bf16* queries = scratch.take<bf16>(rows * dim);
        float* mixed = scratch.take<float>(rows * rank);
        float* totals = scratch.take<float>(rows * LANES);
        float* peaks = scratch.take<float>(rows);
        float* shrink = scratch.take<float>(rows);
        float* scores = scratch.take<float>(rows * BLOCK);
        bf16* weights = scratch.take<bf16>(rows * BLOCK);
        int64_t longest = 0;
        for (int64_t t = 0; t < count; t++) {
            std::memcpy(queries + t * width * dim, q + (mine[t] * heads + head) * dim, width * dim * sizeof(bf16));
            longest = std::max(longest, batch.positions[first + mine[t]]);
        }
        std::fill(mixed, mixed + rows * rank, 0.0f);
        std::fill(totals, totals + rows * LANES, 0.0f);
        std::fill(peaks, peaks + rows, -INFINITY);
        for (int64_t b = 0; b <= longest / BLOCK; b++)
            for (int64_t from = 0, to; from < count; from = to) {
                to = from + 1;
                int64_t seen = visible(mine[from], b);
                if (seen <= 0) continue;
                const int32_t block = table(mine[from])[b];
                for (; to < count && visible(mine[to], b) > 0 && table(mine[to])[b] == block; to++)
                    seen = std::max(seen, visible(mine[to], b));
                const bf16* keys = cache + block * BLOCK * dim;
                // The block that comes next is fetched meanwhile, half of it during each of the two products.
                const int32_t next = visible(mine[from], b + 1) > 0 ? table(mine[from])[b + 1] : block;
                const bf16* soon = cache + next * BLOCK * dim;
                in_passes((to - from) * width, PASS, [&](int64_t r, int64_t n) {
                    const bool fetch = r == 0 && soon != keys;
                    r += from * width;
                    for (int64_t g = 0; g < seen; g += LANES)
                        dot(queries + r * dim, dim, n, keys + g * dim, dim, dim, scores + r * BLOCK + g, BLOCK,
                            fetch && g < BLOCK / 2 ? soon - keys : 0);
                });
                int64_t sees[TASK_ROWS];
                for (int64_t r = from * width; r < to * width; r++) sees[r] = visible(mine[r / width], b);
                soften(from * width, to * width, sees, scores, weights, peaks, shrink, totals);
                in_passes((to - from) * width, MIXED, [&](int64_t r, int64_t n) {
                    const bool fetch = r == 0 && soon != keys;
                    r += from * width;
                    mix(weights + r * BLOCK, BLOCK, n, keys, dim, seen, mixed + r * rank, rank, rank, shrink + r,
                        fetch ? soon + BLOCK / 2 * dim : nullptr);
                });
            }
        for (int64_t r = 0; r < rows; r++) {
            const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(totals + r * LANES)));
            bf16* to = out + (mine[r / width] * heads + head + r % width) * rank;
            for (int64_t d = 0; d < rank; d += PAIR_ROW) {
                const __m512 low = _mm512_loadu_ps(mixed + r * rank + d);
                const __m512 high = _mm512_loadu_ps(mixed + r * rank + d + LANES);
                for (int h = 0; h < 2; h++)
                    store(to + d + h * LANES, _mm512_mul_ps(straight(low, high, h), inverse));
            }
        }
    }

    int64_t visible(int32_t token, int64_t block) const {
        return std::min(BLOCK, batch.positions[first + token] + 1 - block * BLOCK);
    }

    // A block's scores of some rows, of which the first `sees` count, into weights relative to the highest score so
    // far. What a row has come to before has to be multiplied by `shrink`, which this function does to `totals`.
    void soften(int64_t from, int64_t to, const int64_t* sees, float* scores, bf16* weights, float* peaks,
                float* shrink, float* totals) const {
        const __m512 none = _mm512_set1_ps(-INFINITY);
        for (int64_t r = from; r < to; r++) {
            float* row = scores + r * BLOCK;
            if (sees[r] < BLOCK)
                for (int64_t i = sees[r] / LANES * LANES; i < BLOCK; i += LANES) {
                    const __mmask16 seen = __mmask16((1u << std::max<int64_t>(sees[r] - i, 0)) - 1);
                    _mm512_store_ps(row + i, _mm512_mask_load_ps(none, seen, row + i));
                }
            const __m512 top = _mm512_max_ps(_mm512_max_ps(_mm512_load_ps(row), _mm512_load_ps(row + 16)),
                                             _mm512_max_ps(_mm512_load_ps(row + 32), _mm512_load_ps(row + 48)));
            const float before = peaks[r];
            peaks[r] = std::max(before, _mm512_reduce_max_ps(top) * scale);
            shrink[r] = before - peaks[r];
        }
        for (int64_t r = from; r < to; r += LANES) {
            const __mmask16 rows = __mmask16((1u << std::min(to - r, LANES)) - 1);
            _mm512_mask_storeu_ps(shrink + r, rows, exponential(_mm512_maskz_loadu_ps(rows, shrink + r)));
        }
        for (int64_t r = from; r < to; r++) {
            __m512 sum = _mm512_mul_ps(_mm512_load_ps(totals + r * LANES), _mm512_set1_ps(shrink[r]));
            for (int i = 0; i < BLOCK; i += LANES) {
                const __m512 s = _mm512_load_ps(scores + r * BLOCK + i);
                const __m512 power = exponential(_mm512_fmsub_ps(s, _mm512_set1_ps(scale), _mm512_set1_ps(peaks[r])));
                store(weights + r * BLOCK + i, power);
                sum = _mm512_add_ps(sum, power);
            }
            _mm512_store_ps(totals + r * LANES, sum);
        }
    }
};

// Threads worth their start for so many multiplications (6 million take some 60 microseconds): all or one, for OpenMP
// ends threads that a smaller team leaves over, and starts them anew for the next larger one.
inline int threads_for(int64_t products) { return products < 6'000'000 ? 1 : omp_get_max_threads(); }

inline void normalize(const bf16* x, const bf16* weight, bf16* out, int64_t dim, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t j = 0; j < dim; j += LANES) squares = _mm512_fmadd_ps(load(x + j), load(x + j), squares);
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(dim) + eps));
    for (int64_t j = 0; j < dim; j += LANES)
        store(out + j, _mm512_mul_ps(_mm512_mul_ps(load(x + j), inverse), load(weight + j)));
}

}  // namespace

extern "C" {

// One layer: sizes, matrices [out, in] and vectors, as the checkpoint names them. What a layer lacks is null, or 0.
struct Layer {
    const bf16 *input_norm, *q_a, *q_a_bias, *q_a_norm, *q_b, *kv_a, *kv_a_bias, *kv_norm, *kv_b, *o, *o_bias;
    const bf16 *post_norm, *gate_up, *down;  // the latter of the shared experts, or of the dense feed-forward
    const bf16* gate;                        // null in a dense layer, as all about routing that follows
    const float* gate_bias;
    const bf16 *experts_gate_up, *experts_down;
    int64_t hidden, heads, nope, rotary, v_dim, rank, q_rank;
    int64_t width, experts, expert_width, chosen, sigmoid, groups, topk_group, two_best, normalize;
    float eps, latent_eps, scale, factor;
};

}

namespace {

// The attention half of a layer: x [tokens, hidden] gets attention's output added, the cache the tokens' latents.
class AttentionHalf {
    static constexpr int64_t PIECE = 512;  // tokens whose queries are in memory at once
    const Layer& l;
    const Batch& batch;
    bf16 *const x, *const cache;
    const int64_t dim = l.rank + l.rotary, qk = l.nope + l.rotary;
    const Matrix q_a{l.q_a, l.q_rank, l.hidden}, kv_a{l.kv_a, dim, l.hidden};
    const Matrix q_b{l.q_b, l.heads * qk, l.q_rank ? l.q_rank : l.hidden}, o{l.o, l.hidden, l.heads * l.v_dim};
    bf16 *normed, *low, *latents, *queries, *absorbed, *mixed, *values;

public:
    AttentionHalf(const Layer& l, const Batch& batch, bf16* x, bf16* cache) : l(l), batch(batch), x(x), cache(cache) {
        thread_local Scratch scratch;
        const int64_t n = batch.tokens, piece = std::min(n, PIECE), heads = piece * l.heads;
        const auto bytes = Scratch::bytes<bf16>;
        scratch.reserve(bytes(n * l.hidden) + bytes(piece * l.q_rank) + bytes(n * dim) + bytes(heads * qk) +
                        bytes(heads * dim) + bytes(heads * l.rank) + bytes(heads * l.v_dim));
        normed = scratch.take<bf16>(n * l.hidden);
        low = scratch.take<bf16>(piece * l.q_rank);
        latents = scratch.take<bf16>(n * dim);
        queries = scratch.take<bf16>(heads * qk);
        absorbed = scratch.take<bf16>(heads * dim);
        mixed = scratch.take<bf16>(heads * l.rank);
        values = scratch.take<bf16>(heads * l.v_dim);
    }

    void run() {
        const int64_t n = batch.tokens;
        int64_t products = n * (l.q_rank * l.hidden + l.hidden * dim + q_b.out * q_b.in + o.out * o.in +
                                l.heads * l.rank * (l.nope + l.v_dim));
        for (int64_t t = 0; t < n; t++) products += (batch.positions[t] + 1) * l.heads * (dim + l.rank);
        std::vector<PagedAttention> attentions;
        for (int64_t first = 0; first < n; first += PIECE)
            attentions.emplace_back(batch, cache, absorbed, mixed, first, std::min(PIECE, n - first), l.heads, dim,
                                    l.rank, l.scale);
#pragma omp parallel num_threads(threads_for(products))
        {
            latents_into_cache();
            for (const PagedAttention& attention : attentions) piece(attention);
        }
    }

private:
    // What follows is done by all threads together: each loop `omp for` ends when all of it is done.

    void latents_into_cache() {
        const int64_t n = batch.tokens;
#pragma omp for
        for (int64_t t = 0; t < n; t++)
            normalize(x + t * l.hidden, l.input_norm, normed + t * l.hidden, l.hidden, l.eps);
#pragma omp for
        for (int64_t p = 0; p < kv_a.panels(); p++) kv_a.multiply_into(latents, normed, l.hidden, n, p, l.kv_a_bias);
#pragma omp for
        for (int64_t t = 0; t < n; t++) {
            bf16* to = cache + batch.slots[t] * dim;
            normalize(latents + t * dim, l.kv_norm, to, l.rank, l.latent_eps);
            turn(latents + t * dim + l.rank, to + l.rank, t);
        }
    }

    void turn(const bf16* from, bf16* to, int64_t token) const {
        const int64_t half = l.rotary / 2;
        rotate(from, to, batch.cos + token * half, batch.sin + token * half, l.rotary, batch.interleave);
    }

    void piece(const PagedAttention& attention) {
        const int64_t n = attention.tokens, first = attention.first;
        const bf16* in = normed + first * l.hidden;
        if (l.q_rank) {
#pragma omp for
            for (int64_t p = 0; p < q_a.panels(); p++) q_a.multiply_into(low, in, l.hidden, n, p, l.q_a_bias);
#pragma omp for
            for (int64_t t = 0; t < n; t++)
                normalize(low + t * l.q_rank, l.q_a_norm, low + t * l.q_rank, l.q_rank, l.latent_eps);
            in = low;
        }
#pragma omp for
        for (int64_t p = 0; p < q_b.panels(); p++) q_b.multiply_into(queries, in, q_b.in, n, p);
        // (W_k c) . q = c . (W_k^T q): the key's expansion moves over to the query ...
#pragma omp for
        for (int64_t h = 0; h < l.heads; h++) absorb(h, n, first);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < attention.tasks(); task++) attention.run(task);
        // ... and the value's expansion to the weighted sum of latents.
        const int64_t panels = l.v_dim / LANES;
#pragma omp for
        for (int64_t i = 0; i < l.heads * panels; i++) {
            const int64_t h = i / panels, p = i % panels;
            const Matrix expand{l.kv_b + (h * (l.nope + l.v_dim) + l.nope) * l.rank, l.v_dim, l.rank};
            expand.multiply(mixed + h * l.rank, l.heads * l.rank, n, p, [&](int64_t t, __m512 sum) {
                store(values + (t * l.heads + h) * l.v_dim + p * LANES, sum);
            });
        }
#pragma omp for
        for (int64_t p = 0; p < o.panels(); p++)
            o.multiply(values, o.in, n, p, [&](int64_t t, __m512 sum) {
                if (l.o_bias) sum = _mm512_add_ps(sum, load(l.o_bias + p * LANES));
                bf16* to = x + (first + t) * l.hidden + p * LANES;
                store(to, _mm512_add_ps(load(to), sum));
            });
    }

    void absorb(int64_t h, int64_t n, int64_t first) {
        const bf16* keys = l.kv_b + h * (l.nope + l.v_dim) * l.rank;
        thread_local std::vector<float> sums;
        sums.resize(MIXED * l.rank);
        in_passes(n, MIXED, [&](int64_t t, int64_t count) {
            mix(queries + (t * l.heads + h) * qk, l.heads * qk, count, keys, l.rank, l.nope, sums.data(), l.rank,
                l.rank, nullptr, nullptr);
            for (int64_t r = 0; r < count; r++) {
                bf16* to = absorbed + ((t + r) * l.heads + h) * dim;
                for (int64_t d = 0; d < l.rank; d += PAIR_ROW) {
                    const __m512 low = _mm512_loadu_ps(&sums[r * l.rank + d]);
                    const __m512 high = _mm512_loadu_ps(&sums[r * l.rank + d + LANES]);
                    for (int half = 0; half < 2; half++) store(to + d + half * LANES, straight(low, high, half));
                }
                turn(queries + ((t + r) * l.heads + h) * qk + l.nope, to + l.rank, first + t + r);
            }
        });
    }
};

inline int64_t best(const std::vector<float>& x) { return std::max_element(x.begin(), x.end()) - x.begin(); }

// The other half: x [tokens, hidden] gets the shared and the chosen experts' outputs added, or the dense layer's.
class FeedForwardHalf {
    // A feed-forward and the rows that go through it: whose they are and what they weigh, or all tokens with weight 1.
    struct Part {
        Matrix gate_up, down;
        const bf16* rows;
        int64_t count;
        const int32_t* tokens;
        const float* weights;
        bf16* inner;  // [count, width]
    };

    const Layer& l;
    bf16* const x;
    const int64_t n;
    std::vector<Part> parts;
    int64_t panels = 0;  // of all parts, of what lies inside them
    bf16 *normed, *gathered, *inner;
    float *scores, *weights, *sorted_weights;
    int32_t *chosen, *sorted_tokens;

public:
    FeedForwardHalf(const Layer& l, bf16* x, int64_t n) : l(l), x(x), n(n) {
        thread_local Scratch scratch;
        const int64_t choices = n * l.chosen;
        const auto bytes = Scratch::bytes<bf16>;
        const auto words = Scratch::bytes<float>;
        scratch.reserve(bytes(n * l.hidden) + bytes(choices * l.hidden) +
                        bytes(choices * l.expert_width + n * l.width) + words(n * l.experts) + 4 * words(choices));
        normed = scratch.take<bf16>(n * l.hidden);
        gathered = scratch.take<bf16>(choices * l.hidden);
        inner = scratch.take<bf16>(choices * l.expert_width + n * l.width);
        scores = scratch.take<float>(n * l.experts);
        weights = scratch.take<float>(choices);
        sorted_weights = scratch.take<float>(choices);
        chosen = scratch.take<int32_t>(choices);
        sorted_tokens = scratch.take<int32_t>(choices);
    }

    void run() {
        const int64_t products = n * l.hidden * (3 * (l.chosen * l.expert_width + l.width) + l.experts);
#pragma omp parallel num_threads(threads_for(products))
        {
#pragma omp for
            for (int64_t t = 0; t < n; t++)
                normalize(x + t * l.hidden, l.post_norm, normed + t * l.hidden, l.hidden, l.eps);
            if (l.gate) {
                const Matrix gate{l.gate, l.experts, l.hidden};
#pragma omp for
                for (int64_t p = 0; p < gate.panels(); p++)
                    gate.multiply(normed, l.hidden, n, p, [&](int64_t t, __m512 sum) {
                        _mm512_storeu_ps(scores + t * l.experts + p * LANES, sum);
                    });
#pragma omp for
                for (int64_t t = 0; t < n; t++) choose(t);
            }
#pragma omp single
            share_out();
#pragma omp for
            for (int64_t c = 0; c < n * l.chosen; c++)
                std::memcpy(gathered + c * l.hidden, normed + sorted_tokens[c] * l.hidden, l.hidden * sizeof(bf16));
#pragma omp for schedule(dynamic, 4)
            for (int64_t panel = 0; panel < panels; panel++) go_in(panel);
#pragma omp for
            for (int64_t panel = 0; panel < l.hidden / LANES; panel++) come_out(panel);
        }
    }

private:
    // The token's experts and their weights, as `Gate` in model/moe.py has them; of equal ones the first. What is not
    // a number is chosen first, so that it is seen.
    void choose(int64_t t) {
        float* s = scores + t * l.experts;
        score(s);
        thread_local std::vector<float> biased, ranks;
        biased.assign(s, s + l.experts);
        for (int64_t e = 0; e < l.experts; e++) {
            if (l.gate_bias) biased[e] += l.gate_bias[e];
            if (std::isnan(biased[e])) biased[e] = INFINITY;
        }
        if (l.groups) {
            const int64_t size = l.experts / l.groups;
            ranks.resize(l.groups);
            for (int64_t g = 0; g < l.groups; g++) {
                float first = -INFINITY, second = -INFINITY;
                for (int64_t e = g * size; e < (g + 1) * size; e++) {
                    second = std::max(second, std::min(first, biased[e]));
                    first = std::max(first, biased[e]);
                }
                ranks[g] = l.two_best ? first + second : first;
            }
            thread_local std::vector<char> admitted;
            admitted.assign(l.groups, 0);
            for (int64_t i = 0; i < l.topk_group; i++) {
                const int64_t g = best(ranks);
                admitted[g] = 1;
                ranks[g] = -INFINITY;
            }
            for (int64_t e = 0; e < l.experts; e++)
                if (!admitted[e / size]) biased[e] = -INFINITY;
        }
        float total = 0.0f;
        for (int64_t c = t * l.chosen; c < (t + 1) * l.chosen; c++) {
            const int64_t e = best(biased);
            biased[e] = -INFINITY;
            chosen[c] = int32_t(e);
            weights[c] = s[e];
            total += s[e];
        }
        const float factor = l.normalize ? l.factor / (total + 1e-20f) : l.factor;
        for (int64_t c = t * l.chosen; c < (t + 1) * l.chosen; c++) weights[c] *= factor;
    }

    void score(float* s) const {
        if (l.sigmoid) {
            for (int64_t e = 0; e < l.experts; e += LANES) _mm512_storeu_ps(s + e, sigmoid(_mm512_loadu_ps(s + e)));
            return;
        }
        __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (int64_t e = 0; e < l.experts; e += LANES) top = _mm512_max_ps(top, _mm512_loadu_ps(s + e));
        top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        for (int64_t e = 0; e < l.experts; e += LANES) {
            const __m512 power = exponential(_mm512_sub_ps(_mm512_loadu_ps(s + e), top));
            total = _mm512_add_ps(total, power);
            _mm512_storeu_ps(s + e, power);
        }
        const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(total));
        for (int64_t e = 0; e < l.experts; e += LANES)
            _mm512_storeu_ps(s + e, _mm512_div_ps(_mm512_loadu_ps(s + e), sum));
    }

    // Sorts the choices by expert, and makes a part of each expert that was chosen; the shared ones come last.
    void share_out() {
        std::vector<int64_t> ends(l.experts + 1);
        for (int64_t c = 0; c < n * l.chosen; c++) ends[chosen[c] + 1]++;
        for (int64_t e = 0, before = 0; e < l.experts; e++) {
            const int64_t count = ends[e + 1];
            if (count)
                parts.push_back({{l.experts_gate_up + e * 2 * l.expert_width * l.hidden, 2 * l.expert_width, l.hidden},
                                 {l.experts_down + e * l.hidden * l.expert_width, l.hidden, l.expert_width},
                                 gathered + before * l.hidden, count, sorted_tokens + before, sorted_weights + before,
                                 inner + before * l.expert_width});
            ends[e + 1] = before += count;
        }
        for (int64_t c = 0; c < n * l.chosen; c++) {
            const int64_t place = ends[chosen[c]]++;
            sorted_tokens[place] = int32_t(c / l.chosen);
            sorted_weights[place] = weights[c];
        }
        if (l.width)
            parts.push_back({{l.gate_up, 2 * l.width, l.hidden}, {l.down, l.hidden, l.width}, normed, n, nullptr,
                             nullptr, inner + n * l.chosen * l.expert_width});
        for (const Part& part : parts) panels += part.down.in / LANES;
    }

    // SiLU(gate) * up of 16 of the inner columns.
    void go_in(int64_t panel) {
        const Part* part = &parts[0];
        for (; panel >= part->down.in / LANES; part++) panel -= part->down.in / LANES;
        const int64_t width = part->down.in, hidden = l.hidden;
        in_passes(part->count, PASS, [&](int64_t first, int64_t count) {
            alignas(64) float gate[PASS * LANES], up[PASS * LANES];
            const bf16 *in = part->rows + first * hidden, *w = part->gate_up.data + panel * LANES * hidden;
            const int64_t ahead = first ? 0 : LANES * hidden;
            dot(in, hidden, count, w, hidden, hidden, gate, LANES, ahead);
            dot(in, hidden, count, w + width * hidden, hidden, hidden, up, LANES, ahead);
            for (int64_t r = 0; r < count; r++) {
                const __m512 g = _mm512_load_ps(gate + r * LANES);
                store(part->inner + (first + r) * width + panel * LANES,
                      _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), _mm512_load_ps(up + r * LANES)));
            }
        });
    }

    // 16 columns of the result: every token's parts in the order of the experts, then what it was before.
    void come_out(int64_t panel) {
        thread_local std::vector<float> sums;
        sums.assign(n * LANES, 0.0f);
        for (const Part& part : parts)
            part.down.multiply(part.inner, part.down.in, part.count, panel, [&](int64_t row, __m512 sum) {
                float* to = &sums[(part.tokens ? part.tokens[row] : row) * LANES];
                const __m512 weight = _mm512_set1_ps(part.weights ? part.weights[row] : 1.0f);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, weight, _mm512_loadu_ps(to)));
            });
        for (int64_t t = 0; t < n; t++) {
            bf16* to = x + t * l.hidden + panel * LANES;
            store(to, _mm512_add_ps(load(to), _mm512_loadu_ps(&sums[t * LANES])));
        }
    }
};

}  // namespace

extern "C" {

// out [tokens, heads, rank]: q [tokens, heads, dim] over cache [blocks, 64, dim], whose first `rank` numbers are also
// the values. Token t sees positions 0 .. positions[t] of the sequence whose blocks are in row owners[t] of tables.
void paged_attention(const bf16* q, const bf16* cache, const int32_t* tables, const int32_t* owners,
                     const int64_t* positions, bf16* out, int64_t tokens, int64_t heads, int64_t dim, int64_t rank,
                     int64_t most_blocks, float scale) {
    const Batch batch{tokens, positions, nullptr, owners, tables, most_blocks, nullptr, nullptr, 0};
    const PagedAttention attention(batch, cache, q, out, 0, tokens, heads, dim, rank, scale);
    int64_t pairs = 0;
    for (int64_t t = 0; t < tokens; t++) pairs += positions[t] + 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(pairs * heads * (dim + rank)))
    for (int64_t task = 0; task < attention.tasks(); task++) attention.run(task);
}

// out [rows, out_dim] = x [rows, in] @ weight.T (+ bias), x's rows `stride` apart.
void linear(const bf16* x, int64_t stride, const bf16* weight, const bf16* bias, bf16* out, int64_t rows, int64_t in,
            int64_t out_dim) {
    const Matrix matrix{weight, out_dim, in};
#pragma omp parallel for num_threads(threads_for(rows * in * out_dim))
    for (int64_t panel = 0; panel < matrix.panels(); panel++)
        matrix.multiply_into(out, x, stride, rows, panel, bias);
}

// The second half of a layer, x [tokens, hidden] in place.
void feed_forward(const Layer* layer, bf16* x, int64_t tokens) {
    constexpr int64_t PIECE = 1024;
    for (int64_t first = 0; first < tokens; first += PIECE)
        FeedForwardHalf(*layer, x + first * layer->hidden, std::min(PIECE, tokens - first)).run();
}

// A whole layer, x [tokens, hidden] in place. The cache is the layer's, [blocks, 64, rank + rotary].
void block_forward(const Layer* layer, const Batch* batch, bf16* x, bf16* cache) {
    AttentionHalf(*layer, *batch, x, cache).run();
    feed_forward(layer, x, batch->tokens);
}

}  // extern "C"
