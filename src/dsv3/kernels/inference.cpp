// The layers of the network for new tokens against their cache, on x86; called through ctypes by inference.py.
//
// Everything rests on two products:
//   Panels      x . row for 16 or 32 rows of a matrix at a time, in whatever format it lies (products.h);
//   mix         a weighted sum of rows of bf16, neighbouring rows interleaved in registers.
// Each number of a result is added up in one order, which depends neither on the other rows of x nor on their number
// or the number of threads. So what is computed for a token is the same bits whatever else is in the batch, however
// its prompt was cut, and on any number of threads.

#include <omp.h>

#include <optional>

#include "products.h"

namespace dsv3 {
namespace {

constexpr int64_t BLOCK = 64;  // cached tokens to a block
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

// A block's scores of some rows, of which the first `sees` count, into weights relative to the highest score so
// far. What a row has come to before has to be multiplied by `shrink`, which this function does to `totals`.
void soften(int64_t from, int64_t to, const int64_t* sees, float scale, float* scores, bf16* weights, float* peaks,
            float* shrink, float* totals) {
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

// A sum that `mix` made over the total of its weights, in the order of columns.
void straighten(const float* mixed, const float* totals, bf16* to, int64_t columns) {
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(totals)));
    for (int64_t d = 0; d < columns; d += PAIR_ROW) {
        const __m512 low = _mm512_loadu_ps(mixed + d), high = _mm512_loadu_ps(mixed + d + LANES);
        for (int h = 0; h < 2; h++) store(to + d + h * LANES, _mm512_mul_ps(straight(low, high, h), inverse));
    }
}

constexpr int64_t TASK_ROWS = 64;  // heads of tokens that read a block of the cache together
constexpr int64_t SEGMENT = 8;     // blocks whose weighted sum is made by itself
constexpr size_t SHARED = 1 << 26; // bytes that threads who share contexts may take for such sums

// Attention over the cache for `tokens` tokens from `first` on, q [tokens, heads, dim] and out [tokens, heads, rank].
//
// A context is cut into segments, at places that are the same for everybody. What each gives, weights relative to its
// own highest score, is merged in their order. So threads may share a long context among them, or one may go through
// all of it, with the same result.
class PagedAttention {
    // Heads `head` .. head + width of `count` tokens, a row each.
    struct Task {
        const int32_t* mine;
        int64_t head, width, count, rows, longest;
    };
    // What rows have come to so far: the sum of values, of weights (in 16 parts), and the highest score.
    struct State {
        float *mixed, *totals, *peaks;

        static size_t bytes(int64_t rows, int64_t rank) {
            return Scratch::bytes<float>(rows * rank) + Scratch::bytes<float>(rows * LANES) + Scratch::bytes<float>(rows);
        }
        State(Scratch& from, int64_t rows, int64_t rank)
            : mixed(from.take<float>(rows * rank)), totals(from.take<float>(rows * LANES)), peaks(from.take<float>(rows)) {}
        void clear(int64_t rows, int64_t rank) const {
            std::fill(mixed, mixed + rows * rank, 0.0f);
            std::fill(totals, totals + rows * LANES, 0.0f);
            std::fill(peaks, peaks + rows, -INFINITY);
        }
    };

    const Batch& batch;
    const bf16* cache;
    const bf16* q;
    bf16* out;
    int64_t heads, dim, rank;
    float scale;
    std::vector<int32_t> order;  // of tokens: those that share blocks side by side
    std::vector<Task> tasks;
    std::vector<int64_t> ends;  // of each task's segments, if threads share them: numbers up to which they are its own
    std::vector<State> states;  // of all segments then

public:
    const int64_t first, tokens;

    PagedAttention(const Batch& batch, const bf16* cache, const bf16* q, bf16* out, int64_t first, int64_t tokens,
                   int64_t heads, int64_t dim, int64_t rank, float scale)
        : batch(batch), cache(cache), q(q), out(out), heads(heads), dim(dim), rank(rank), scale(scale),
          order(tokens), first(first), tokens(tokens) {
        // Fewer rows where there would be less than two tasks for each thread, but no fewer than `dot` takes at once.
        const int64_t threads = omp_get_max_threads(), share = (tokens * heads + 2 * threads - 1) / (2 * threads);
        const int64_t most = threads == 1 ? TASK_ROWS : std::clamp((share + PASS - 1) / PASS * PASS, PASS, TASK_ROWS);
        const int64_t chunks = (heads + most - 1) / most, chunk = (heads + chunks - 1) / chunks;
        for (int64_t i = 0; i < tokens; i++) order[i] = int32_t(i);
        // Whoever shares any block shares the first one.
        std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return table(a)[0] < table(b)[0]; });
        std::vector<int32_t> starts;
        for (int64_t i = 0; i < tokens; i++)
            if (!i || (i - starts.back() + 1) * chunk > most || table(order[i])[0] != table(order[i - 1])[0])
                starts.push_back(int32_t(i));
        for (size_t part = 0; part < starts.size(); part++)
            for (int64_t head = 0; head < heads; head += chunk) {
                Task task{&order[starts[part]], head, std::min(chunk, heads - head), 0, 0, 0};
                task.count = (part + 1 < starts.size() ? starts[part + 1] : tokens) - starts[part];
                task.rows = task.count * task.width;
                for (int64_t t = 0; t < task.count; t++)
                    task.longest = std::max(task.longest, batch.positions[first + task.mine[t]]);
                tasks.push_back(task);
            }
    }

    // All of it, by all threads of a team together.
    void together() {
#pragma omp master
        share_segments();  // by one and the same thread always, whose memory the segments' sums are
#pragma omp barrier
        if (ends.empty()) {
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < tasks.size(); i++) alone(tasks[i]);
            return;
        }
        // A few in a row for each thread, for what comes next is fetched ahead.
        const int64_t in_a_row = std::max<int64_t>(1, ends.back() / (2 * omp_get_num_threads()));
#pragma omp for schedule(dynamic, in_a_row)
        for (int64_t i = 0; i < ends.back(); i++) {
            const size_t task = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
            states[i].clear(tasks[task].rows, rank);
            attend(tasks[task], i - (task ? ends[task - 1] : 0), states[i]);
        }
#pragma omp for
        for (size_t i = 0; i < tasks.size(); i++) {
            const int64_t begin = i ? ends[i - 1] : 0;
            for (int64_t other = begin + 1; other < ends[i]; other++) merge(tasks[i], states[begin], states[other]);
            finish(tasks[i], states[begin]);
        }
    }

private:
    const int32_t* table(int32_t token) const { return batch.tables + batch.owners[first + token] * batch.most_blocks; }
    static int64_t segments(const Task& task) { return task.longest / (BLOCK * SEGMENT) + 1; }

    // Whether there are so few tasks that threads had better go through the segments of one together.
    void share_segments() {
        const int64_t threads = omp_get_num_threads();
        int64_t most = 0;
        size_t bytes = 0;
        for (const Task& task : tasks) {
            most = std::max(most, segments(task));
            bytes += segments(task) * State::bytes(task.rows, rank);
        }
        if (threads == 1 || most == 1 || int64_t(tasks.size()) >= 4 * threads || bytes > SHARED) return;
        thread_local Scratch scratch;
        scratch.reserve(bytes);
        for (const Task& task : tasks) {
            for (int64_t i = 0; i < segments(task); i++) states.emplace_back(scratch, task.rows, rank);
            ends.push_back(int64_t(states.size()));
        }
    }

    void alone(const Task& task) const {
        thread_local Scratch scratch;
        scratch.reserve(2 * State::bytes(task.rows, rank));
        const State all(scratch, task.rows, rank), part(scratch, task.rows, rank);
        all.clear(task.rows, rank);
        attend(task, 0, all);
        for (int64_t i = 1; i < segments(task); i++) {
            part.clear(task.rows, rank);
            attend(task, i, part);
            merge(task, all, part);
        }
        finish(task, all);
    }

    // A segment of some rows' contexts. Blocks come one after the other; rows whose block is the same read it together.
    // Each row's maximum, sum and mixture grow from block to block in the order of its own context.
    void attend(const Task& task, int64_t segment, const State& state) const {
        thread_local Scratch scratch;
        const int32_t* mine = task.mine;
        const int64_t width = task.width, count = task.count, rows = task.rows;
        scratch.reserve(Scratch::bytes<bf16>(rows * dim) + Scratch::bytes<float>(rows) +
                        Scratch::bytes<float>(rows * BLOCK) + Scratch::bytes<bf16>(rows * BLOCK));
        bf16* queries = scratch.take<bf16>(rows * dim);
        float* shrink = scratch.take<float>(rows);
        float* scores = scratch.take<float>(rows * BLOCK);
        bf16* weights = scratch.take<bf16>(rows * BLOCK);
        for (int64_t t = 0; t < count; t++)
            std::memcpy(queries + t * width * dim, q + (mine[t] * heads + task.head) * dim, width * dim * sizeof(bf16));
        const int64_t last = std::min((segment + 1) * SEGMENT, task.longest / BLOCK + 1);
        for (int64_t b = segment * SEGMENT; b < last; b++)
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
                        dot(queries + r * dim, dim, n, keys + g * dim, dim, dim, nullptr, scores + r * BLOCK + g,
                            BLOCK, fetch && g < BLOCK / 2 ? soon - keys : 0);
                });
                int64_t sees[TASK_ROWS];
                for (int64_t r = from * width; r < to * width; r++) sees[r] = visible(mine[r / width], b);
                soften(from * width, to * width, sees, scale, scores, weights, state.peaks, shrink, state.totals);
                in_passes((to - from) * width, MIXED, [&](int64_t r, int64_t n) {
                    const bool fetch = r == 0 && soon != keys;
                    r += from * width;
                    mix(weights + r * BLOCK, BLOCK, n, keys, dim, seen, state.mixed + r * rank, rank, rank, shrink + r,
                        fetch ? soon + BLOCK / 2 * dim : nullptr);
                });
            }
    }

    // Adds to what rows have come to what the next segment gives; nothing, not a bit, to a row whose context ended before.
    void merge(const Task& task, const State& all, const State& part) const {
        for (int64_t r = 0; r < task.rows; r++) {
            const float peak = std::max(all.peaks[r], part.peaks[r]);
            const __m512 old = exponential(_mm512_set1_ps(all.peaks[r] - peak));
            const __m512 added = exponential(_mm512_set1_ps(part.peaks[r] - peak));
            const auto add = [&](float* to, const float* from) {
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(from), added, _mm512_mul_ps(_mm512_loadu_ps(to), old)));
            };
            add(all.totals + r * LANES, part.totals + r * LANES);
            for (int64_t d = 0; d < rank; d += LANES) add(all.mixed + r * rank + d, part.mixed + r * rank + d);
            all.peaks[r] = peak;
        }
    }

    void finish(const Task& task, const State& state) const {
        for (int64_t r = 0; r < task.rows; r++) {
            bf16* to = out + (task.mine[r / task.width] * heads + task.head + r % task.width) * rank;
            straighten(state.mixed + r * rank, state.totals + r * LANES, to, rank);
        }
    }

    int64_t visible(int32_t token, int64_t block) const {
        return std::min(BLOCK, batch.positions[first + token] + 1 - block * BLOCK);
    }
};

// Attention in the plain form for the last `tokens` ones of a context.
struct PlainAttention {
    static constexpr int64_t ROWS = 128;  // tokens of a head that read keys and values together
    const bf16 *q, *kv, *k_rope;          // [tokens, heads, nope + rotary], turned; [context, heads, nope + v_dim]; rows
    int64_t rope_stride;                  // of [context, rotary], turned, so far apart
    bf16* out;                            // [tokens, heads, v_dim]
    int64_t tokens, context, heads, nope, rotary, v_dim;
    float scale;

    int64_t tasks() const { return heads * ((tokens + ROWS - 1) / ROWS); }

    // The longest contexts come first, so that no thread is left with one in the end.
    void run(int64_t task) const {
        thread_local Scratch scratch;
        const int64_t head = task % heads, first = ((tokens + ROWS - 1) / ROWS - 1 - task / heads) * ROWS;
        const int64_t rows = std::min(ROWS, tokens - first), dim = nope + rotary, before = context - tokens + first;
        const int64_t of_panel = dim / 2 * LANES, kv_stride = heads * (nope + v_dim);
        scratch.reserve(Scratch::bytes<Pair>(BLOCK / LANES * of_panel) + Scratch::bytes<float>(rows * v_dim) +
                        Scratch::bytes<float>(rows * LANES) + 2 * Scratch::bytes<float>(rows) +
                        Scratch::bytes<float>(rows * BLOCK) + Scratch::bytes<bf16>(rows * BLOCK));
        Pair* keys = scratch.take<Pair>(BLOCK / LANES * of_panel);
        float* mixed = scratch.take<float>(rows * v_dim);
        float* totals = scratch.take<float>(rows * LANES);
        float* peaks = scratch.take<float>(rows);
        float* shrink = scratch.take<float>(rows);
        float* scores = scratch.take<float>(rows * BLOCK);
        bf16* weights = scratch.take<bf16>(rows * BLOCK);
        std::fill(mixed, mixed + rows * v_dim, 0.0f);
        std::fill(totals, totals + rows * LANES, 0.0f);
        std::fill(peaks, peaks + rows, -INFINITY);
        for (int64_t key = 0; key < before + rows; key += BLOCK) {
            const int64_t there = std::min(BLOCK, context - key), from = std::max<int64_t>(0, key - before);
            const bf16* block = kv + key * kv_stride + head * (nope + v_dim);
            for (int64_t g = 0; g < there; g += LANES) turn(block, key, g, there, keys + g / LANES * of_panel, kv_stride);
            in_passes(rows - from, WIDE_PASS, [&](int64_t r, int64_t n) {
                r += from;
                const bf16* x = q + ((first + r) * heads + head) * dim;
                for (int64_t g = 0; g < there; g += PAIR_ROW) {
                    const Pair* w = keys + g / LANES * of_panel;
                    float* to = scores + r * BLOCK + g;
                    FOR_ROWS(6, n, (turned_tile<N, 2, false>(x, heads * dim, w, of_panel, dim, nullptr, to, BLOCK)))
                }
            });
            int64_t sees[ROWS];
            for (int64_t r = from; r < rows; r++) sees[r] = std::min(BLOCK, before + r + 1 - key);
            soften(from, rows, sees, scale, scores, weights, peaks, shrink, totals);
            in_passes(rows - from, MIXED, [&](int64_t r, int64_t n) {
                r += from;
                mix(weights + r * BLOCK, BLOCK, n, block + nope, kv_stride, there, mixed + r * v_dim, v_dim, v_dim,
                    shrink + r, nullptr);
            });
        }
        for (int64_t r = 0; r < rows; r++)
            straighten(mixed + r * v_dim, totals + r * LANES, out + ((first + r) * heads + head) * v_dim, v_dim);
    }

    // Keys g .. g + 15 of a block as products read them; what lies behind the last of `there` is read again in its place.
    void turn(const bf16* block, int64_t key, int64_t g, int64_t there, Pair* to, int64_t kv_stride) const {
        bf16 copy[LANES][LANES];
        for (int64_t d = 0; d < nope + rotary; d += LANES, to += LANES / 2 * LANES) {
            const bool in_rope = d >= nope;
            const bf16* from = in_rope ? k_rope + key * rope_stride + d - nope : block + d;
            const int64_t stride = in_rope ? rope_stride : kv_stride;
            __m512i pairs[8];
            if (g + LANES <= there) {
                turn_panel(Rows<bf16>(from + g * stride, stride), pairs);
            } else {
                for (int64_t i = 0; i < LANES; i++)
                    std::memcpy(copy[i], from + std::min(g + i, there - 1) * stride, sizeof copy[i]);
                turn_panel(Rows<bf16>(copy[0], LANES), pairs);
            }
            for (int j = 0; j < 8; j++) _mm512_store_si512(to + j * LANES, pairs[j]);
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
    Matrix q_a, q_b, kv_a, o;
    Matrix gate_up, down;   // of the shared experts, or of the dense feed-forward
    const Matrix* routed;   // [experts, 2]: each expert's gate_up and down; null in a dense layer
    const bf16 *input_norm, *q_a_bias, *q_a_norm, *kv_a_bias, *kv_norm, *kv_b, *o_bias, *post_norm;
    const bf16* gate;
    const float* gate_bias;
    int64_t hidden, heads, nope, rotary, v_dim, rank, q_rank;
    int64_t width, experts, expert_width, chosen, sigmoid, groups, topk_group, two_best, normalize;
    int64_t form;  // in which the matrices that are not bf16 want x (products.h); 0 if all are
    float eps, latent_eps, scale, factor;
};

}

namespace {

// What follows is called by all threads of a team together: the loop ends when all of it is done.

// use(panel, count) for all panels of a matrix, one or two at a time.
template <class Use>
inline void by_panels(const Matrix& m, int64_t rows, Use use) {
    const int64_t step = rows > PASS ? 2 : 1;
#pragma omp for schedule(dynamic, 4)
    for (int64_t p = 0; p < panels(m); p += step) use(p, std::min(step, panels(m) - p));
}

// `count` panels from `panel` on with rows of x: finish(row, column, sums) gets 16 columns at a time.
template <class Finish>
inline void multiply(const Matrix& m, int64_t panel, int64_t count, const Input& x, int64_t rows, Finish finish) {
    auto each = [&](int64_t row, const float* sums) {
        for (int64_t i = 0; i < count; i++) finish(row, (panel + i) * LANES, _mm512_loadu_ps(sums + i * LANES));
    };
    if (count == 2)
        Panels(m, panel, panel + 1).multiply(x, rows, each);
    else
        Panels(m, panel).multiply(x, rows, each);
}

// out [rows, m.out] = x @ the matrix transposed (+ bias).
inline void multiply_into(bf16* out, const Matrix& m, const Input& x, int64_t rows, const bf16* bias = nullptr) {
    by_panels(m, rows, [&](int64_t p, int64_t count) {
        multiply(m, p, count, x, rows, [&](int64_t row, int64_t column, __m512 sum) {
            if (bias) sum = _mm512_add_ps(sum, load(bias + column));
            store(out + row * m.out + column, sum);
        });
    });
}

// The attention half of a layer: x [tokens, hidden] gets attention's output added, the cache the tokens' latents.
class AttentionHalf {
    static constexpr int64_t PIECE = 512;  // tokens whose queries are in memory at once
    const Layer& l;
    const Batch& batch;
    bf16 *const x, *const cache;
    const int64_t dim = l.rank + l.rotary, qk = l.nope + l.rotary;
    bf16 *normed, *low, *latents, *queries, *absorbed, *mixed, *values;
    Input normed_in, low_in, values_in;
    std::vector<PagedAttention> attentions;  // of each piece

    static int64_t form(std::initializer_list<const Matrix*> matrices) {
        int64_t found = AS_IT_IS;
        for (const Matrix* m : matrices) found = std::max(found, form_for(*m));
        return found;
    }

public:
    AttentionHalf(const Layer& l, const Batch& batch, bf16* x, bf16* cache)
        : l(l), batch(batch), x(x), cache(cache), normed_in(nullptr, 0, 0), low_in(nullptr, 0, 0),
          values_in(nullptr, 0, 0) {
        thread_local Scratch scratch;
        const int64_t n = batch.tokens, piece = std::min(n, PIECE), heads = piece * l.heads;
        const int64_t of_x = form({&l.kv_a, l.q_rank ? &l.q_a : &l.q_b}), of_low = l.q_rank ? form({&l.q_b}) : 0;
        const int64_t of_values = form({&l.o}), v = l.heads * l.v_dim;
        const auto bytes = Scratch::bytes<bf16>;
        scratch.reserve(bytes(n * l.hidden) + bytes(piece * l.q_rank) + bytes(n * dim) + bytes(heads * qk) +
                        bytes(heads * dim) + bytes(heads * l.rank) + bytes(heads * l.v_dim) +
                        Input::bytes(n, l.hidden, of_x) + Input::bytes(piece, l.q_rank, of_low) +
                        Input::bytes(piece, v, of_values));
        normed = scratch.take<bf16>(n * l.hidden);
        low = scratch.take<bf16>(piece * l.q_rank);
        latents = scratch.take<bf16>(n * dim);
        queries = scratch.take<bf16>(heads * qk);
        absorbed = scratch.take<bf16>(heads * dim);
        mixed = scratch.take<bf16>(heads * l.rank);
        values = scratch.take<bf16>(heads * l.v_dim);
        normed_in = Input(normed, l.hidden, n, l.hidden, of_x, scratch);
        low_in = Input(low, l.q_rank, piece, l.q_rank, of_low, scratch);
        values_in = Input(values, v, piece, v, of_values, scratch);
        attentions.reserve((n + PIECE - 1) / PIECE);
        for (int64_t first = 0; first < n; first += PIECE)
            attentions.emplace_back(batch, cache, absorbed, mixed, first, std::min(PIECE, n - first), l.heads, dim,
                                    l.rank, l.scale);
    }

    static int64_t products(const Layer& l, const Batch& batch) {
        const int64_t dim = l.rank + l.rotary;
        int64_t context = 0;
        for (int64_t t = 0; t < batch.tokens; t++) context += batch.positions[t] + 1;
        return batch.tokens * (l.q_rank * l.hidden + l.hidden * dim + l.q_b.out * l.q_b.in + l.o.out * l.o.in +
                               l.heads * l.rank * (l.nope + l.v_dim)) +
               context * l.heads * (dim + l.rank);
    }

    // By all threads of a team together.
    void together() {
        latents_into_cache();
        for (PagedAttention& attention : attentions) piece(attention);
    }

private:
    // What follows is done by all threads together: each loop `omp for` ends when all of it is done.

    void latents_into_cache() {
        const int64_t n = batch.tokens;
#pragma omp for
        for (int64_t t = 0; t < n; t++) {
            normalize(x + t * l.hidden, l.input_norm, normed + t * l.hidden, l.hidden, l.eps);
            normed_in.prepare(t);
        }
        multiply_into(latents, l.kv_a, normed_in, n, l.kv_a_bias);
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

    void piece(PagedAttention& attention) {
        const int64_t n = attention.tokens, first = attention.first;
        Input in = normed_in.from(first);
        if (l.q_rank) {
            multiply_into(low, l.q_a, in, n, l.q_a_bias);
#pragma omp for
            for (int64_t t = 0; t < n; t++) {
                normalize(low + t * l.q_rank, l.q_a_norm, low + t * l.q_rank, l.q_rank, l.latent_eps);
                low_in.prepare(t);
            }
            in = low_in;
        }
        multiply_into(queries, l.q_b, in, n);
        // (W_k c) . q = c . (W_k^T q): the key's expansion moves over to the query ...
#pragma omp for
        for (int64_t h = 0; h < l.heads; h++) absorb(h, n, first);
        attention.together();
        // ... and the value's expansion to the weighted sum of latents.
        const int64_t of_head = l.v_dim / LANES;
#pragma omp for
        for (int64_t i = 0; i < l.heads * of_head; i++) {
            const int64_t h = i / of_head, p = i % of_head;
            const bf16* expand = l.kv_b + (h * (l.nope + l.v_dim) + l.nope) * l.rank;
            const Matrix matrix{expand, nullptr, nullptr, BF16, l.v_dim, l.rank, 0};
            Panels(matrix, p).multiply(Input(mixed + h * l.rank, l.heads * l.rank, l.rank), n, [&](int64_t t, const float* sum) {
                store(values + (t * l.heads + h) * l.v_dim + p * LANES, _mm512_loadu_ps(sum));
            });
        }
        if (values_in.form)
#pragma omp for
            for (int64_t t = 0; t < n; t++) values_in.prepare(t);
        by_panels(l.o, n, [&](int64_t p, int64_t count) {
            multiply(l.o, p, count, values_in, n, [&](int64_t t, int64_t column, __m512 sum) {
                if (l.o_bias) sum = _mm512_add_ps(sum, load(l.o_bias + column));
                bf16* to = x + (first + t) * l.hidden + column;
                store(to, _mm512_add_ps(load(to), sum));
            });
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

// Where not all experts are in memory at once: what `route` decided for some tokens, and which experts have their turn.
// What these and those before have come to is in `sums`; the last wave, up to l.experts, has the shared ones too.
struct Wave {
    int32_t* chosen;  // [tokens, l.chosen]
    float* weights;   // of the same shape
    float* sums;      // [tokens, l.hidden]
    int64_t first, last;

    bool has(int32_t expert) const { return first <= expert && expert < last; }
};

// The other half: x [tokens, hidden] gets the shared and the chosen experts' outputs added, or the dense layer's.
class FeedForwardHalf {
    // A feed-forward and the rows that go through it: whose they are and what they weigh, or all tokens with weight 1.
    struct Part {
        const Matrix *gate_up, *down;
        Input rows, inner;
        int64_t count;
        const int32_t* tokens;
        const float* weights;
    };

    const Layer& l;
    bf16* const x;
    const int64_t n;
    const Wave* const wave;   // null: all at once
    const int64_t choices;    // of experts that have their turn
    const bool shares;        // whether the shared ones have
    std::vector<Part> parts;
    int64_t inner_panels = 0;  // of all parts, of what lies inside them
    bf16 *normed, *gathered, *inner, *shared_inner;
    float *scores, *weights, *sorted_weights;
    int32_t *chosen, *sorted_tokens;
    Input normed_in, gathered_in, inner_in, shared_in;

public:
    FeedForwardHalf(const Layer& l, bf16* x, int64_t n, const Wave* wave = nullptr)
        : l(l), x(x), n(n), wave(wave), choices(wave ? count(*wave, n * l.chosen) : n * l.chosen),
          shares(l.width && (!wave || (wave->sums && wave->last == l.experts))), normed_in(nullptr, 0, 0), gathered_in(nullptr, 0, 0),
          inner_in(nullptr, 0, 0), shared_in(nullptr, 0, 0) {
        thread_local Scratch scratch;
        const auto bytes = Scratch::bytes<bf16>;
        const auto words = Scratch::bytes<float>;
        scratch.reserve(bytes(n * l.hidden) + bytes(choices * l.hidden) + bytes(choices * l.expert_width) +
                        bytes(n * l.width) + words(n * l.experts) + 2 * words(choices) +
                        2 * words(wave ? 0 : choices) +
                        Input::bytes(n, l.hidden, l.form) + Input::bytes(choices, l.hidden, l.form) +
                        Input::bytes(choices, l.expert_width, l.form) + Input::bytes(n, l.width, l.form));
        normed = scratch.take<bf16>(n * l.hidden);
        gathered = scratch.take<bf16>(choices * l.hidden);
        inner = scratch.take<bf16>(choices * l.expert_width);
        shared_inner = scratch.take<bf16>(n * l.width);
        scores = scratch.take<float>(n * l.experts);
        weights = wave ? wave->weights : scratch.take<float>(choices);
        sorted_weights = scratch.take<float>(choices);
        chosen = wave ? wave->chosen : scratch.take<int32_t>(choices);
        sorted_tokens = scratch.take<int32_t>(choices);
        normed_in = Input(normed, l.hidden, n, l.hidden, l.form, scratch);
        gathered_in = Input(gathered, l.hidden, choices, l.hidden, l.form, scratch);
        inner_in = Input(inner, l.expert_width, choices, l.expert_width, l.form, scratch);
        shared_in = Input(shared_inner, l.width, n, l.width, l.form, scratch);
    }

    // Nothing but the choice of experts.
    void route() {
#pragma omp parallel num_threads(threads_for(n * l.hidden * l.experts))
        {
            normalize_all();
            choose_all();
        }
    }

    void run() {
#pragma omp parallel num_threads(threads_for(products(l, n, choices, shares) + (wave ? 0 : n * l.hidden * l.experts)))
        together();
    }

    static int64_t products(const Layer& l, int64_t n, int64_t choices, bool shares) {
        return 3 * l.hidden * (choices * l.expert_width + (shares ? n * l.width : 0));
    }

    // By all threads of a team together.
    void together() {
        normalize_all();
        if (l.gate && !wave) choose_all();
#pragma omp single
        share_out();
#pragma omp for
        for (int64_t c = 0; c < choices; c++) gathered_in.copy_row(c, normed_in, sorted_tokens[c]);
#pragma omp for schedule(dynamic, 4)
        for (int64_t panel = 0; panel < inner_panels; panel++) go_in(panel);
        if (l.form) {
#pragma omp for nowait
            for (int64_t c = 0; c < choices; c++) inner_in.prepare(c);
#pragma omp for
            for (int64_t t = 0; t < (shares ? n : 0); t++) shared_in.prepare(t);
        }
        const int64_t step = n > PASS ? 2 : 1;
#pragma omp for schedule(dynamic, 4)
        for (int64_t panel = 0; panel < l.hidden / LANES; panel += step)
            come_out(panel, std::min(step, l.hidden / LANES - panel));
    }

private:
    static int64_t count(const Wave& wave, int64_t choices) {
        if (!wave.sums) return 0;  // nobody has chosen yet
        return std::count_if(wave.chosen, wave.chosen + choices, [&](int32_t e) { return wave.has(e); });
    }

    // Both are done by all threads together.
    void normalize_all() {
#pragma omp for
        for (int64_t t = 0; t < n; t++) {
            normalize(x + t * l.hidden, l.post_norm, normed + t * l.hidden, l.hidden, l.eps);
            normed_in.prepare(t);
        }
    }

    void choose_all() {
        const Matrix gate{l.gate, nullptr, nullptr, BF16, l.experts, l.hidden, 0};
        by_panels(gate, n, [&](int64_t p, int64_t count) {
            multiply(gate, p, count, normed_in, n, [&](int64_t t, int64_t column, __m512 sum) {
                _mm512_storeu_ps(scores + t * l.experts + column, sum);
            });
        });
#pragma omp for
        for (int64_t t = 0; t < n; t++) choose(t);
    }

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
        const auto waits = [&](int64_t c) { return wave && !wave->has(chosen[c]); };
        for (int64_t c = 0; c < n * l.chosen; c++)
            if (!waits(c)) ends[chosen[c] + 1]++;
        for (int64_t e = 0, before = 0; e < l.experts; e++) {
            const int64_t count = ends[e + 1];
            if (count)
                parts.push_back({l.routed + 2 * e, l.routed + 2 * e + 1, gathered_in.from(before), inner_in.from(before),
                                 count, sorted_tokens + before, sorted_weights + before});
            ends[e + 1] = before += count;
        }
        for (int64_t c = 0; c < n * l.chosen; c++) {
            if (waits(c)) continue;
            const int64_t place = ends[chosen[c]]++;
            sorted_tokens[place] = int32_t(c / l.chosen);
            sorted_weights[place] = weights[c];
        }
        if (shares) parts.push_back({&l.gate_up, &l.down, normed_in, shared_in, n, nullptr, nullptr});
        for (const Part& part : parts) inner_panels += part.down->in / LANES;
    }

    // SiLU(gate) * up of 16 of the inner columns.
    void go_in(int64_t panel) {
        const Part* part = &parts[0];
        for (; panel >= part->down->in / LANES; part++) panel -= part->down->in / LANES;
        const int64_t width = part->down->in;
        bf16* to = const_cast<bf16*>(part->inner.x) + panel * LANES;
        Panels(*part->gate_up, panel, panel + width / LANES).multiply(part->rows, part->count, [&](int64_t row, const float* sums) {
            const __m512 gate = _mm512_loadu_ps(sums), up = _mm512_loadu_ps(sums + LANES);
            store(to + row * width, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up));
        });
    }

    // 16 or 32 columns of the result: every token's parts in the order of the experts, then what it was before.
    void come_out(int64_t panel, int64_t count) {
        thread_local std::vector<float> sums;
        const int64_t columns = count * LANES;
        sums.assign(n * columns, 0.0f);
        if (wave && wave->first) move_sums(&sums[0], panel * LANES, columns, false);
        for (const Part& part : parts)
            multiply(*part.down, panel, count, part.inner, part.count, [&](int64_t row, int64_t column, __m512 sum) {
                float* to = &sums[(part.tokens ? part.tokens[row] : row) * columns + column - panel * LANES];
                const __m512 weight = _mm512_set1_ps(part.weights ? part.weights[row] : 1.0f);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, weight, _mm512_loadu_ps(to)));
            });
        if (wave && wave->last < l.experts) return move_sums(&sums[0], panel * LANES, columns, true);
        for (int64_t t = 0; t < n; t++)
            for (int64_t j = 0; j < columns; j += LANES) {
                bf16* to = x + t * l.hidden + panel * LANES + j;
                store(to, _mm512_add_ps(load(to), _mm512_loadu_ps(&sums[t * columns + j])));
            }
    }

    // Columns of what the waves have come to, from the wave or back to it.
    void move_sums(float* sums, int64_t column, int64_t columns, bool back) const {
        for (int64_t t = 0; t < n; t++) {
            float *here = sums + t * columns, *there = wave->sums + t * l.hidden + column;
            std::memcpy(back ? there : here, back ? here : there, columns * sizeof(float));
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
    PagedAttention attention(batch, cache, q, out, 0, tokens, heads, dim, rank, scale);
    int64_t pairs = 0;
    for (int64_t t = 0; t < tokens; t++) pairs += positions[t] + 1;
#pragma omp parallel num_threads(threads_for(pairs * heads * (dim + rank)))
    attention.together();
}

// What PlainAttention says of its arguments.
void plain_attention(const bf16* q, const bf16* kv, const bf16* k_rope, int64_t rope_stride, bf16* out, int64_t tokens,
                     int64_t context, int64_t heads, int64_t nope, int64_t rotary, int64_t v_dim, float scale) {
    const PlainAttention attention{q, kv, k_rope, rope_stride, out, tokens, context, heads, nope, rotary, v_dim, scale};
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(tokens * context * heads * (nope + rotary + v_dim)))
    for (int64_t task = 0; task < attention.tasks(); task++) attention.run(task);
}

// out [rows, m.out] = x [rows, m.in] @ m.T (+ bias), x's rows `stride` apart.
void linear(const bf16* x, int64_t stride, const Matrix* m, const bf16* bias, bf16* out, int64_t rows) {
    thread_local Scratch scratch;
    const int64_t form = form_for(*m);
    scratch.reserve(Input::bytes(rows, m->in, form));
    const Input in(x, stride, rows, m->in, form, scratch);
#pragma omp parallel num_threads(threads_for(rows * m->in * m->out))
    {
        if (form)
#pragma omp for
            for (int64_t t = 0; t < rows; t++) in.prepare(t);
        multiply_into(out, *m, in, rows, bias);
    }
}

constexpr int64_t PIECE = 1024;  // tokens whose experts' inputs are in memory at once

// The second half of a layer, x [tokens, hidden] in place.
void feed_forward(const Layer* layer, bf16* x, int64_t tokens) {
    for (int64_t first = 0; first < tokens; first += PIECE)
        FeedForwardHalf(*layer, x + first * layer->hidden, std::min(PIECE, tokens - first)).run();
}

// The experts that x [tokens, hidden] chooses before that half, and what they weigh, both [tokens, chosen].
void route(const Layer* layer, bf16* x, int64_t tokens, int32_t* chosen, float* weights) {
    for (int64_t first = 0; first < tokens; first += PIECE) {
        const int64_t at = first * layer->chosen;
        const Wave nobody{chosen + at, weights + at, nullptr, layer->experts, layer->experts};
        FeedForwardHalf(*layer, x + first * layer->hidden, std::min(PIECE, tokens - first), &nobody).route();
    }
}

// That half in waves, for choices that `route` made: experts first .. last - 1 have their turn. Waves come in the order
// of the experts, from 0 on, and the one that ends with the last expert changes x.
void feed_forward_wave(const Layer* layer, bf16* x, int64_t tokens, int32_t* chosen, float* weights, float* sums,
                       int64_t first_expert, int64_t last_expert) {
    for (int64_t first = 0; first < tokens; first += PIECE) {
        const int64_t at = first * layer->chosen, row = first * layer->hidden;
        const Wave wave{chosen + at, weights + at, sums + row, first_expert, last_expert};
        FeedForwardHalf(*layer, x + row, std::min(PIECE, tokens - first), &wave).run();
    }
}

// The first half of a layer, x [tokens, hidden] in place. The cache is the layer's, [blocks, 64, rank + rotary].
void attention_half(const Layer* layer, const Batch* batch, bf16* x, bf16* cache) {
    AttentionHalf half(*layer, *batch, x, cache);
#pragma omp parallel num_threads(threads_for(AttentionHalf::products(*layer, *batch)))
    half.together();
}

// Whole layers one after the other, x [tokens, hidden] in place, each with its own cache. Threads are woken once for
// all of them: a layer of a small model takes no longer than that.
void blocks_forward(const Layer* const* layers, bf16* const* caches, int64_t count, const Batch* batch, bf16* x) {
    const int64_t n = batch->tokens;
    int64_t products = 0;
    for (int64_t i = 0; i < count; i++)
        products += AttentionHalf::products(*layers[i], *batch) +
                    FeedForwardHalf::products(*layers[i], n, n * layers[i]->chosen, true);
    std::optional<AttentionHalf> attention;
    std::optional<FeedForwardHalf> feed_forward;
#pragma omp parallel num_threads(threads_for(products))
    for (int64_t i = 0; i < count; i++) {
#pragma omp master
        attention.emplace(*layers[i], *batch, x, caches[i]);
#pragma omp barrier
        attention->together();
        for (int64_t first = 0; first < n; first += PIECE) {
#pragma omp master
            feed_forward.emplace(*layers[i], x + first * layers[i]->hidden, std::min(PIECE, n - first));
#pragma omp barrier
            feed_forward->together();
        }
    }
}

}  // extern "C"
}  // namespace dsv3
