// Training's hot operations on x86, called through ctypes by native.py.
//
// Only what torch does badly is here; large matrix products are left to oneDNN. Numbers in memory are bfloat16,
// arithmetic is float32. Every function divides independent rows or heads among OpenMP threads and gives the same
// bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace dsv3 {
namespace {

// C [ROWS, 16 * VECTORS] (+)= A B, all of it in registers. A's pair (row, k) is at a[row * a_row + k * a_k],
// B's pairs for one k are a row of `ldb`.
template <int ROWS, int VECTORS>
inline void product_tile(const Pair* a, int64_t a_row, int64_t a_k, const Pair* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t pairs, bool add) {
    __m512 sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh right[VECTORS];
        for (int j = 0; j < VECTORS; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + j * LANES);
        for (int i = 0; i < ROWS; i++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32(int(a[i * a_row + k * a_k]));
            for (int j = 0; j < VECTORS; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) _mm512_storeu_ps(c + i * ldc + j * LANES, sum[i][j]);
}

// C [rows, cols] (+)= A B; rows a multiple of 4, cols of 16.
void product(const Pair* a, int64_t a_row, int64_t a_k, const Pair* b, int64_t ldb, float* c, int64_t ldc,
             int64_t rows, int64_t cols, int64_t pairs, bool add) {
    for (int64_t j = 0; j < cols; j += 64)
        for (int64_t i = 0; i < rows; i += 4) {
            const Pair* left = a + i * a_row;
            const Pair* right = b + j;
            float* out = c + i * ldc + j;
            switch (std::min<int64_t>(4, (cols - j) / LANES)) {
                case 4: product_tile<4, 4>(left, a_row, a_k, right, ldb, out, ldc, pairs, add); break;
                case 3: product_tile<4, 3>(left, a_row, a_k, right, ldb, out, ldc, pairs, add); break;
                case 2: product_tile<4, 2>(left, a_row, a_k, right, ldb, out, ldc, pairs, add); break;
                default: product_tile<4, 1>(left, a_row, a_k, right, ldb, out, ldc, pairs, add);
            }
        }
}

// One head's [seq, dim] matrix, padded with zero rows to a multiple of 64, in the three layouts that products read.
struct Head {
    int64_t seq, padded, dim;
    std::vector<bf16> rows;    // as it is: left operand, summed over dim
    std::vector<Pair> by_dim;  // [dim / 2, padded]: right operand, summed over dim
    std::vector<Pair> by_row;  // [padded / 2, dim]: right operand, summed over rows

    Head(int64_t seq, int64_t padded, int64_t dim) : seq(seq), padded(padded), dim(dim), rows(padded * dim) {}
    void read(const bf16* from, int64_t stride) {
        for (int64_t i = 0; i < seq; i++) std::memcpy(&rows[i * dim], from + i * stride, dim * sizeof(bf16));
    }
    const Pair* left() const { return (const Pair*)rows.data(); }
    void pack_by_dim() {
        by_dim.resize(dim / 2 * padded);
        for (int64_t block = 0; block < padded; block += LANES)
            for (int64_t d = 0; d < dim / 2; d++)
                for (int64_t i = block; i < block + LANES; i++) by_dim[d * padded + i] = left()[i * dim / 2 + d];
    }
    void pack_by_row() {
        by_row.resize(padded / 2 * dim);
        for (int64_t i = 0; i < padded; i += 2)
            for (int64_t d = 0; d < dim; d++)
                by_row[i / 2 * dim + d] = Pair(rows[i * dim + d]) | Pair(rows[(i + 1) * dim + d]) << 16;
    }
};

// The gradient of `rotate` is the turn back; `first` and `second` hold 16 numbers of each half.
inline void rotate_back(__m512 first, __m512 second, bf16* to, const float* cos, const float* sin, int64_t j,
                        int64_t half, bool interleave) {
    const __m512 c = _mm512_loadu_ps(cos + j), s = _mm512_loadu_ps(sin + j);
    const __m512 a = _mm512_fmadd_ps(second, s, _mm512_mul_ps(first, c));
    const __m512 b = _mm512_fmsub_ps(second, c, _mm512_mul_ps(first, s));
    if (interleave) {
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(b)), 16);
        _mm512_storeu_si512(to + 2 * j, _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(a)), high));
    } else {
        store(to + j, a);
        store(to + half + j, b);
    }
}

constexpr int64_t BLOCK = 64;

}  // namespace

extern "C" {

// A tensor [batch, heads, seq, dim] whose last dimension is contiguous.
struct View {
    bf16* data;
    int64_t batch, head, seq;  // strides
    bf16* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// Causal attention: a block of queries at a time, its scores over all keys it sees, softmax, times the values.
// lse [batch, heads, seq] gets the logarithm of each softmax's denominator, which is all the backward pass needs.
void attention_forward(View q, View k, View v, View out, float* lse, int64_t batch, int64_t heads, int64_t seq,
                       int64_t dim, int64_t v_dim, float scale) {
    const int64_t padded = (seq + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp parallel
    {
        Head queries(seq, padded, dim), keys(seq, padded, dim), values(seq, padded, v_dim);
        std::vector<float> scores(BLOCK * padded), result(BLOCK * v_dim);
        std::vector<bf16> weights(BLOCK * padded);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < batch * heads; item++) {
            const int64_t b = item / heads, h = item % heads;
            queries.read(q.at(b, h), q.seq);
            keys.read(k.at(b, h), k.seq);
            keys.pack_by_dim();
            values.read(v.at(b, h), v.seq);
            values.pack_by_row();
            for (int64_t first = 0; first < seq; first += BLOCK) {
                const int64_t seen = first + BLOCK, rows = std::min(BLOCK, seq - first);
                product(queries.left() + first * dim / 2, dim / 2, 1, keys.by_dim.data(), padded, scores.data(),
                        padded, BLOCK, seen, dim / 2, false);
                float inverse[BLOCK];
                for (int64_t i = 0; i < BLOCK; i++) {
                    float* row = &scores[i * padded];
                    for (int64_t j = first + i + 1; j < seen; j++) row[j] = -INFINITY;
                    // `top` may lose a NaN; its exponential does not, and makes `total` one.
                    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
                    for (int64_t j = 0; j < seen; j += LANES) top = _mm512_max_ps(top, _mm512_loadu_ps(row + j));
                    const float peak = _mm512_reduce_max_ps(top) * scale;
                    for (int64_t j = 0; j < seen; j += LANES) {
                        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(scale),
                                                         _mm512_set1_ps(peak));
                        const __m512 e = exponential(x);
                        total = _mm512_add_ps(total, e);
                        store(&weights[i * padded + j], e);
                    }
                    const float sum = _mm512_reduce_add_ps(total);
                    inverse[i] = 1.0f / sum;
                    if (i < rows) lse[item * seq + first + i] = peak + __builtin_logf(sum);
                }
                product((const Pair*)weights.data(), padded / 2, 1, values.by_row.data(), v_dim, result.data(), v_dim,
                        BLOCK, v_dim, seen / 2, false);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t d = 0; d < v_dim; d += LANES)
                        store(out.at(b, h) + (first + i) * out.seq + d,
                              _mm512_mul_ps(_mm512_loadu_ps(&result[i * v_dim + d]), _mm512_set1_ps(inverse[i])));
            }
        }
    }
}

// With P the softmax's weights and S the scores before `scale`:
//   dV = P^T dO     dP = dO V^T     dS = P * (dP - rowsum(dO * O)) * scale     dQ = dS K     dK = dS^T Q
// A block of keys at a time; P and dS are made transposed, [keys, queries], for they are summed over queries.
void attention_backward(View q, View k, View v, View out, const float* lse, View grad, View grad_q, View grad_k,
                        View grad_v, int64_t batch, int64_t heads, int64_t seq, int64_t dim, int64_t v_dim,
                        float scale) {
    const int64_t padded = (seq + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp parallel
    {
        Head queries(seq, padded, dim), keys(seq, padded, dim), values(seq, padded, v_dim), grads(seq, padded, v_dim);
        std::vector<float> lses(padded), deltas(padded), sum_q(padded * dim), sum_k(BLOCK * dim), sum_v(BLOCK * v_dim);
        std::vector<float> scores(BLOCK * BLOCK), grad_scores(BLOCK * BLOCK);
        std::vector<bf16> weights(BLOCK * padded), inner(BLOCK * padded);  // P^T and dS^T, [keys, queries]
        std::vector<Pair> inner_by_key(BLOCK / 2 * padded);                // dS^T with its keys in pairs
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < batch * heads; item++) {
            const int64_t b = item / heads, h = item % heads;
            queries.read(q.at(b, h), q.seq);
            queries.pack_by_dim();
            queries.pack_by_row();
            keys.read(k.at(b, h), k.seq);
            keys.pack_by_row();
            values.read(v.at(b, h), v.seq);
            grads.read(grad.at(b, h), grad.seq);
            grads.pack_by_dim();
            grads.pack_by_row();
            for (int64_t i = 0; i < seq; i++) {
                __m512 dot = _mm512_setzero_ps();
                for (int64_t d = 0; d < v_dim; d += LANES)
                    dot = _mm512_fmadd_ps(load(&grads.rows[i * v_dim + d]), load(out.at(b, h) + i * out.seq + d), dot);
                deltas[i] = _mm512_reduce_add_ps(dot);
                lses[i] = lse[item * seq + i];
            }
            std::fill(sum_q.begin(), sum_q.end(), 0.0f);
            for (int64_t first = 0; first < seq; first += BLOCK) {
                const int64_t rows = std::min(BLOCK, seq - first);
                for (int64_t block = first; block < padded; block += BLOCK) {
                    product(keys.left() + first * dim / 2, dim / 2, 1, &queries.by_dim[block], padded, scores.data(),
                            BLOCK, BLOCK, BLOCK, dim / 2, false);
                    product(values.left() + first * v_dim / 2, v_dim / 2, 1, &grads.by_dim[block], padded,
                            grad_scores.data(), BLOCK, BLOCK, BLOCK, v_dim / 2, false);
                    for (int64_t i = 0; i < BLOCK; i += 2)
                        for (int64_t j = 0; j < BLOCK; j += LANES) {
                            __m256i both[2];
                            for (int64_t r = i; r < i + 2; r++) {
                                const __m512 s = _mm512_loadu_ps(&scores[r * BLOCK + j]);
                                __m512 p = exponential(_mm512_fmsub_ps(s, _mm512_set1_ps(scale),
                                                                       _mm512_loadu_ps(&lses[block + j])));
                                if (block == first) {  // the diagonal: a query sees the keys up to its own
                                    const int64_t hidden = std::clamp<int64_t>(r - j, 0, LANES);
                                    p = _mm512_maskz_mov_ps(__mmask16(0xffffu << hidden), p);
                                }
                                const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(&grad_scores[r * BLOCK + j]),
                                                                     _mm512_loadu_ps(&deltas[block + j]));
                                store(&weights[r * padded + block + j], p);
                                both[r - i] = narrow(_mm512_mul_ps(_mm512_mul_ps(p, centred), _mm512_set1_ps(scale)));
                                _mm256_storeu_si256((__m256i*)&inner[r * padded + block + j], both[r - i]);
                            }
                            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(both[1]), 16);
                            _mm512_storeu_si512(&inner_by_key[i / 2 * padded + block + j],
                                                _mm512_or_si512(_mm512_cvtepu16_epi32(both[0]), high));
                        }
                }
                const int64_t queries_left = padded - first;
                product((const Pair*)&weights[first], padded / 2, 1, &grads.by_row[first / 2 * v_dim], v_dim,
                        sum_v.data(), v_dim, BLOCK, v_dim, queries_left / 2, false);
                product((const Pair*)&inner[first], padded / 2, 1, &queries.by_row[first / 2 * dim], dim,
                        sum_k.data(), dim, BLOCK, dim, queries_left / 2, false);
                product(&inner_by_key[first], 1, padded, &keys.by_row[first / 2 * dim], dim, &sum_q[first * dim], dim,
                        queries_left, dim, BLOCK / 2, true);
                for (int64_t i = 0; i < rows; i++) {
                    for (int64_t d = 0; d < dim; d += LANES)
                        store(grad_k.at(b, h) + (first + i) * grad_k.seq + d, _mm512_loadu_ps(&sum_k[i * dim + d]));
                    for (int64_t d = 0; d < v_dim; d += LANES)
                        store(grad_v.at(b, h) + (first + i) * grad_v.seq + d, _mm512_loadu_ps(&sum_v[i * v_dim + d]));
                }
            }
            for (int64_t i = 0; i < seq; i++)
                for (int64_t d = 0; d < dim; d += LANES)
                    store(grad_q.at(b, h) + i * grad_q.seq + d, _mm512_loadu_ps(&sum_q[i * dim + d]));
        }
    }
}

// What latent attention compares: queries whose last `rotary` numbers are turned, and keys made of the first `nope`
// numbers of kv and the one turned key that all heads share. q, kv, out_q, out_k: [tokens, heads, ...]; the angles of
// token t are in row t % positions.
void rope_forward(const bf16* q, const bf16* kv, int64_t kv_dim, const bf16* k_rope, int64_t k_stride, const float* cos,
                  const float* sin, int64_t positions, bf16* out_q, bf16* out_k, int64_t tokens, int64_t heads,
                  int64_t nope, int64_t rotary, int64_t interleave) {
    const int64_t dim = nope + rotary;
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t % positions * (rotary / 2), *s = sin + t % positions * (rotary / 2);
        bf16* shared = out_k + t * heads * dim + nope;
        rotate(k_rope + t * k_stride, shared, c, s, rotary, interleave);
        for (int64_t h = 0; h < heads; h++) {
            const int64_t at = (t * heads + h) * dim;
            std::memcpy(out_q + at, q + at, nope * sizeof(bf16));
            rotate(q + at + nope, out_q + at + nope, c, s, rotary, interleave);
            std::memcpy(out_k + at, kv + (t * heads + h) * kv_dim, nope * sizeof(bf16));
            if (h) std::memcpy(out_k + at + nope, shared, rotary * sizeof(bf16));
        }
    }
}

// The gradients of q and k, [tokens, heads, nope + rotary], taken back: grad_q in place, grad_k to kv's first
// numbers and, added up over the heads, to the shared key.
void rope_backward(bf16* grad_q, const bf16* grad_k, const float* cos, const float* sin, int64_t positions,
                   bf16* grad_kv, int64_t kv_dim, bf16* grad_k_rope, int64_t tokens, int64_t heads, int64_t nope,
                   int64_t rotary, int64_t interleave) {
    const int64_t dim = nope + rotary, half = rotary / 2;
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t % positions * half, *s = sin + t % positions * half;
        for (int64_t h = 0; h < heads; h++) {
            bf16 turned[2 * LANES * 8], *tail = grad_q + (t * heads + h) * dim + nope;
            std::memcpy(turned, tail, rotary * sizeof(bf16));
            for (int64_t j = 0; j < half; j += LANES)
                rotate_back(load(turned + j), load(turned + half + j), tail, c, s, j, half, interleave);
            std::memcpy(grad_kv + (t * heads + h) * kv_dim, grad_k + (t * heads + h) * dim, nope * sizeof(bf16));
        }
        for (int64_t j = 0; j < half; j += LANES) {
            __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
            for (int64_t h = 0; h < heads; h++) {
                const bf16* tail = grad_k + (t * heads + h) * dim + nope + j;
                first = _mm512_add_ps(first, load(tail));
                second = _mm512_add_ps(second, load(tail + half));
            }
            rotate_back(first, second, grad_k_rope + t * rotary, c, s, j, half, interleave);
        }
    }
}

// Rows of logits [rows, vocab], each turned into the gradient of `share` times its cross-entropy; losses [rows].
// A negative target is none: loss and gradient are zero. A NaN in a row makes all of it NaN.
void cross_entropy(bf16* logits, const int64_t* targets, float* losses, int64_t rows, int64_t vocab, float share) {
#pragma omp parallel
    {
        std::vector<float> weights(vocab);
#pragma omp for
        for (int64_t i = 0; i < rows; i++) {
            bf16* row = logits + i * vocab;
            losses[i] = 0.0f;
            if (targets[i] < 0) {
                std::memset(row, 0, vocab * sizeof(bf16));
                continue;
            }
            __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
            for (int64_t j = 0; j < vocab; j += LANES) top = _mm512_max_ps(top, load(row + j));
            const float peak = _mm512_reduce_max_ps(top);
            for (int64_t j = 0; j < vocab; j += LANES) {
                const __m512 e = exponential(_mm512_sub_ps(load(row + j), _mm512_set1_ps(peak)));
                total = _mm512_add_ps(total, e);
                _mm512_storeu_ps(&weights[j], e);
            }
            const float sum = _mm512_reduce_add_ps(total), factor = share / sum;
            losses[i] = peak + __builtin_logf(sum) - widen(row[targets[i]]);
            weights[targets[i]] -= sum;
            for (int64_t j = 0; j < vocab; j += LANES)
                store(row + j, _mm512_mul_ps(_mm512_loadu_ps(&weights[j]), _mm512_set1_ps(factor)));
        }
    }
}

// SiLU(gate) * up of [rows, 2 * width] halves, and what its gradient [rows, width] is for both halves.
void swiglu_forward(const bf16* gate_up, bf16* out, int64_t rows, int64_t width) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *gate = gate_up + i * 2 * width, *up = gate + width;
        for (int64_t j = 0; j < width; j += LANES) {
            const __m512 g = load(gate + j);
            store(out + i * width + j, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), load(up + j)));
        }
    }
}

void swiglu_backward(const bf16* gate_up, const bf16* grad, bf16* result, int64_t rows, int64_t width) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const bf16 *gate = gate_up + i * 2 * width, *up = gate + width;
        bf16 *grad_gate = result + i * 2 * width, *grad_up = grad_gate + width;
        for (int64_t j = 0; j < width; j += LANES) {
            const __m512 g = load(gate + j), s = sigmoid(g), d = load(grad + i * width + j);
            // d/dg (g s) = s (1 + g (1 - s))
            const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
            store(grad_gate + j, _mm512_mul_ps(_mm512_mul_ps(d, load(up + j)), slope));
            store(grad_up + j, _mm512_mul_ps(d, _mm512_mul_ps(g, s)));
        }
    }
}

// RMSNorm of rows `stride` apart; inverse [rows] gets 1 / rms for the backward pass.
void rms_norm_forward(const bf16* x, int64_t stride, const bf16* weight, bf16* out, float* inverse, int64_t rows,
                      int64_t dim, float eps) {
#pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const bf16* row = x + i * stride;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t j = 0; j < dim; j += LANES) squares = _mm512_fmadd_ps(load(row + j), load(row + j), squares);
        inverse[i] = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(dim) + eps);
        for (int64_t j = 0; j < dim; j += LANES)
            store(out + i * dim + j,
                  _mm512_mul_ps(_mm512_mul_ps(load(row + j), _mm512_set1_ps(inverse[i])), load(weight + j)));
    }
}

// With u = x / rms: dx = (w g - u mean(w g u)) / rms, and dw = sum over rows of g u. The latter is summed in `chunks`
// of rows, whatever the number of threads: grad_weight [chunks, dim].
void rms_norm_backward(const bf16* grad, const bf16* x, int64_t stride, const bf16* weight, const float* inverse,
                       bf16* grad_x, float* grad_weight, int64_t rows, int64_t dim, int64_t chunks) {
#pragma omp parallel for
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float* sums = grad_weight + chunk * dim;
        std::fill(sums, sums + dim, 0.0f);
        for (int64_t i = rows * chunk / chunks; i < rows * (chunk + 1) / chunks; i++) {
            const bf16 *g = grad + i * dim, *row = x + i * stride;
            const __m512 scale = _mm512_set1_ps(inverse[i]);
            __m512 dot = _mm512_setzero_ps();
            for (int64_t j = 0; j < dim; j += LANES) {
                const __m512 product = _mm512_mul_ps(load(g + j), _mm512_mul_ps(load(row + j), scale));
                _mm512_storeu_ps(sums + j, _mm512_add_ps(_mm512_loadu_ps(sums + j), product));
                dot = _mm512_fmadd_ps(product, load(weight + j), dot);
            }
            const __m512 along = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(dot) / float(dim)), scale);
            for (int64_t j = 0; j < dim; j += LANES) {
                const __m512 across = _mm512_fnmadd_ps(load(row + j), along, _mm512_mul_ps(load(g + j), load(weight + j)));
                store(grad_x + i * dim + j, _mm512_mul_ps(across, scale));
            }
        }
    }
}

// out[t] = sum over the token's `chosen` places of weight * rows[place]; all weights are one where none are given.
void combine_forward(const bf16* rows, const int64_t* places, const float* weights, bf16* out, int64_t tokens,
                     int64_t chosen, int64_t dim) {
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < dim; j += LANES) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t c = t * chosen; c < (t + 1) * chosen; c++)
                sum = _mm512_fmadd_ps(load(rows + places[c] * dim + j), _mm512_set1_ps(weights ? weights[c] : 1.0f), sum);
            store(out + t * dim + j, sum);
        }
}

// Its gradients: grad_rows[place] = weight * grad[t] and grad_weights = rows[place] . grad[t].
void combine_backward(const bf16* grad, const bf16* rows, const int64_t* places, const float* weights, bf16* grad_rows,
                      float* grad_weights, int64_t tokens, int64_t chosen, int64_t dim) {
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t c = t * chosen; c < (t + 1) * chosen; c++) {
            __m512 dot = _mm512_setzero_ps();
            for (int64_t j = 0; j < dim; j += LANES) {
                const __m512 g = load(grad + t * dim + j);
                dot = _mm512_fmadd_ps(load(rows + places[c] * dim + j), g, dot);
                store(grad_rows + places[c] * dim + j, _mm512_mul_ps(g, _mm512_set1_ps(weights[c])));
            }
            grad_weights[c] = _mm512_reduce_add_ps(dot);
        }
}

// One update of AdamW with float32 weights and gradients and bfloat16 moments; `rate` and `root` hold the corrections
// for moments that began at zero, `keep` what weight decay leaves.
void adamw(float* master, bf16* exp_avg, bf16* exp_avg_sq, const float* grad, int64_t size, float beta1, float beta2,
           float eps, float rate, float root, float keep) {
#pragma omp parallel for
    for (int64_t i = 0; i < size; i += LANES) {
        const __m512 g = _mm512_loadu_ps(grad + i), m = load(exp_avg + i);
        const __m512 first = _mm512_fmadd_ps(_mm512_sub_ps(g, m), _mm512_set1_ps(1.0f - beta1), m);
        const __m512 second = _mm512_fmadd_ps(_mm512_mul_ps(g, g), _mm512_set1_ps(1.0f - beta2),
                                              _mm512_mul_ps(load(exp_avg_sq + i), _mm512_set1_ps(beta2)));
        store(exp_avg + i, first);
        store(exp_avg_sq + i, second);
        const __m512 below = _mm512_fmadd_ps(_mm512_sqrt_ps(second), _mm512_set1_ps(root), _mm512_set1_ps(eps));
        const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(master + i), _mm512_set1_ps(keep));
        const __m512 step = _mm512_div_ps(_mm512_mul_ps(first, _mm512_set1_ps(rate)), below);
        _mm512_storeu_ps(master + i, _mm512_sub_ps(kept, step));
    }
}

}  // extern "C"
}  // namespace dsv3
