// Products of a few rows of x with panels of 16 rows of a matrix, whatever the matrix's numbers are stored as.
//
// Each number of a result is added up in one order that depends neither on the other rows of x nor on how many there
// are. So a kernel for one row and one for many give the same bits.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "vectors.h"

namespace dsv3 {
namespace {

enum Kind : int64_t { BF16, FP8, INT8, INT4 };

constexpr int64_t PAIR_ROW = 2 * LANES;
constexpr int64_t PASS = 8;      // rows of x that sums are kept for at once, straight from the matrix
constexpr int64_t WIDE_PASS = 6; // and with two panels that were unpacked before, which pays for more rows than PASS
constexpr int64_t SCALED = 128;  // numbers of a row, and rows, that share a scale in FP8

}  // namespace

extern "C" {

// A matrix [out, in]. BF16 and FP8 lie row by row; INT8 and INT4 in panels (packed.py says how).
struct Matrix {
    const void* data;
    const void* scale;    // FP8: float [ceil(out / 128), ceil(in / 128)]; INT8, INT4: half [out / 16, in / group, 16]
    const uint8_t* zero;  // of the same shape, or null for 128 (INT8) or 8 (INT4)
    int64_t kind, out, in, group;
};

}

namespace {

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

// How a kind of matrix wants x: rounded to bytes in groups of so many, paired as FP8 is, or as it is.
constexpr int64_t AS_IT_IS = 0, PAIRED = 1;
inline int64_t form_for(const Matrix& m) { return m.kind >= INT8 ? m.group : m.kind == FP8 ? PAIRED : AS_IT_IS; }

// Rows of x as products read them.
struct Input {
    const bf16* x = nullptr;
    int64_t stride = 0, in = 0, form = AS_IT_IS;
    bf16* paired = nullptr;                        // [rows, in]
    int8_t* codes = nullptr;                       // [rows, in]
    float* scale = nullptr;                        // [rows, in / group]
    int32_t *minus8 = nullptr, *minus128 = nullptr;  // [rows, in / group]: the sum of a group's codes, times -8 and -128

    static size_t bytes(int64_t rows, int64_t in, int64_t form) {
        if (form == AS_IT_IS) return 0;
        if (form == PAIRED) return Scratch::bytes<bf16>(rows * in);
        return Scratch::bytes<int8_t>(rows * in) + 3 * Scratch::bytes<float>(rows * (in / form));
    }
    Input(const bf16* x, int64_t stride, int64_t in) : x(x), stride(stride), in(in) {}
    Input(const bf16* x, int64_t stride, int64_t rows, int64_t in, int64_t form, Scratch& scratch)
        : x(x), stride(stride), in(in), form(form) {
        if (form == PAIRED) paired = scratch.take<bf16>(rows * in);
        if (form <= PAIRED) return;
        codes = scratch.take<int8_t>(rows * in);
        scale = scratch.take<float>(rows * (in / form));
        minus8 = scratch.take<int32_t>(rows * (in / form));
        minus128 = scratch.take<int32_t>(rows * (in / form));
    }
    Input from(int64_t row) const {
        Input rest = *this;
        rest.x += row * stride;
        if (form == PAIRED) rest.paired += row * in;
        if (form <= PAIRED) return rest;
        rest.codes += row * in;
        for (auto** p : {&rest.minus8, &rest.minus128}) *p += row * (in / form);
        rest.scale += row * (in / form);
        return rest;
    }
    // Brings row i into the form that is wanted. Rounding: code = x / scale, scale = a group's largest / 127.
    void prepare(int64_t i) const {
        const bf16* row = x + i * stride;
        if (form == PAIRED)
            for (int64_t j = 0; j < in; j += LANES) {
                const __m512i part = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(row + j)));
                _mm256_storeu_si256((__m256i*)(paired + i * in + j), _mm512_castsi512_si256(as_paired(part)));
            }
        if (form <= PAIRED) return;
        for (int64_t g = 0; g < in / form; g++) {
            __m512 top = _mm512_setzero_ps();
            __mmask16 undefined = 0;
            for (int64_t j = 0; j < form; j += LANES) {
                const __m512 part = load(row + g * form + j);
                undefined |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
                top = _mm512_max_ps(_mm512_abs_ps(part), top);
            }
            const float most = undefined ? NAN : _mm512_reduce_max_ps(top);
            // What is not finite shows in the scale; what is too small to be divided by is nothing.
            const float factor = 127.0f / most;
            const __m512 inverse = _mm512_set1_ps(std::isfinite(factor) && std::isfinite(most) ? factor : 0.0f);
            __m512i sum = _mm512_setzero_si512();
            for (int64_t j = 0; j < form; j += LANES) {
                // The maximum is its second operand where the first is not a number.
                const __m512 part = _mm512_mul_ps(load(row + g * form + j), inverse);
                const __m512i code = _mm512_cvtps_epi32(_mm512_max_ps(part, _mm512_set1_ps(-127.0f)));
                _mm_storeu_si128((__m128i*)(codes + i * in + g * form + j), _mm512_cvtsepi32_epi8(code));
                sum = _mm512_add_epi32(sum, code);
            }
            const int total = _mm512_reduce_add_epi32(sum);
            const int64_t at = i * (in / form) + g;
            scale[at] = most / 127.0f;
            minus8[at] = -8 * total;
            minus128[at] = -128 * total;
        }
    }
    // A row that was prepared becomes another row of another input, with all it needs.
    void copy_row(int64_t to, const Input& other, int64_t row) const {
        std::memcpy(const_cast<bf16*>(x) + to * stride, other.x + row * other.stride, in * sizeof(bf16));
        if (form == PAIRED) std::memcpy(paired + to * in, other.paired + row * in, in * sizeof(bf16));
        if (form <= PAIRED) return;
        const int64_t groups = in / form;
        std::memcpy(codes + to * in, other.codes + row * in, in);
        std::memcpy(scale + to * groups, other.scale + row * groups, groups * sizeof(float));
        std::memcpy(minus8 + to * groups, other.minus8 + row * groups, groups * sizeof(int32_t));
        std::memcpy(minus128 + to * groups, other.minus128 + row * groups, groups * sizeof(int32_t));
    }
};

// sum += w * the two numbers at `pair`, which every lane gets. Broadcasting them within the multiplication would be one
// instruction less, and half as fast (Zen 4).
inline void add_products(__m512& sum, __m512i w, const bf16* pair) {
    int bits;
    std::memcpy(&bits, pair, sizeof bits);
    sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(bits));
}

// The same of bytes, four to a lane, w without and x with a sign.
inline void add_bytes(__m512i& sum, __m512i w, const int8_t* four) {
    int bits;
    std::memcpy(&bits, four, sizeof bits);
    sum = _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(bits));
}

// The same of nibbles and eight numbers of x: two products of a nibble and a byte always fit in 16 bits, which is what is
// there without VNNI.
inline void add_nibbles(__m512i& sum, __m512i low, __m512i high, const int8_t* eight) {
    int64_t bits;
    std::memcpy(&bits, eight, sizeof bits);
    const __m512i first = _mm512_maddubs_epi16(low, _mm512_set1_epi32(int(bits)));
    const __m512i second = _mm512_maddubs_epi16(high, _mm512_set1_epi32(int(bits >> 32)));
    const __m512i both = _mm512_add_epi16(first, second);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(both, _mm512_set1_epi16(1)));
}

// Rows so many bytes apart, of which 16 can be reached from four registers and a step; COUNT of them are.
template <class T, int COUNT = 16>
struct Rows {
    const char *p0, *p4, *p8, *p12;
    int64_t step, step3;

    Rows(const T* first, int64_t stride)
        : p0((const char*)first), p4(p0 + 4 * sizeof(T) * stride), p8(p0 + 8 * sizeof(T) * stride),
          p12(p0 + 12 * sizeof(T) * stride), step(sizeof(T) * stride), step3(3 * sizeof(T) * stride) {}
    inline const T* operator[](int i) const {
        const char* four = i < 4 ? p0 : i < 8 ? p4 : i < 12 ? p8 : p12;
        const int64_t on = i % 4 == 0 ? 0 : i % 4 == 1 ? step : i % 4 == 2 ? 2 * step : step3;
        return (const T*)(four + on);
    }
    // On to the next columns. The compiler would rather keep an address for each row, and then run out of registers.
    inline void advance(int64_t columns) {
        const int64_t bytes = columns * int64_t(sizeof(T));
        asm("" : "+r"(p0 += bytes));
        if (COUNT > 4) asm("" : "+r"(p4 += bytes));
        if (COUNT > 8) asm("" : "+r"(p8 += bytes));
        if (COUNT > 12) asm("" : "+r"(p12 += bytes));
    }
};

// 16 numbers of each of two rows.
inline __m512i load_two(const bf16* a, const bf16* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)),
                              _mm256_loadu_si256((const __m256i*)b), 1);
}

// 16 columns of 16 rows of bf16: pairs[j] gets the j-th pair of columns, a lane for each row.
inline void turn_panel(const Rows<bf16>& rows, __m512i* pairs) {
    // Of rows 0-3 and 4-7 (then 8-11 and 12-15), in lanes 0 and 2: pair j; in lanes 1 and 3: pair 4 + j.
    __m512i quads[2][4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const int at = 8 * i;
        const __m512i a = load_two(rows[at], rows[at + 4]), b = load_two(rows[at + 1], rows[at + 5]);
        const __m512i c = load_two(rows[at + 2], rows[at + 6]), d = load_two(rows[at + 3], rows[at + 7]);
        const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        const __m512i ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
        quads[i][0] = _mm512_unpacklo_epi64(ab, cd);
        quads[i][1] = _mm512_unpackhi_epi64(ab, cd);
        quads[i][2] = _mm512_unpacklo_epi64(ab2, cd2);
        quads[i][3] = _mm512_unpackhi_epi64(ab2, cd2);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        pairs[j] = _mm512_shuffle_i32x4(quads[0][j], quads[1][j], 0x88);
        pairs[4 + j] = _mm512_shuffle_i32x4(quads[0][j], quads[1][j], 0xdd);
    }
}

// 16 bytes of each of four rows.
inline __m512i load_four(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)a));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)b), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)c), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i*)d), 3);
}

// 16 columns of 16 rows of e4m3, the same way.
inline void turn_panel(const Rows<uint8_t>& rows, __m512i* pairs) {
    const __m512i a = load_four(rows[0], rows[4], rows[8], rows[12]), b = load_four(rows[1], rows[5], rows[9], rows[13]);
    const __m512i c = load_four(rows[2], rows[6], rows[10], rows[14]), d = load_four(rows[3], rows[7], rows[11], rows[15]);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
    const __m512i ab2 = _mm512_unpackhi_epi32(a, b), cd2 = _mm512_unpackhi_epi32(c, d);
    const __m512i fours[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                              _mm512_unpacklo_epi64(ab2, cd2), _mm512_unpackhi_epi64(ab2, cd2)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        widen_e4m3(fours[j], pairs[2 * j], pairs[2 * j + 1]);
    }
}

// Sums of x . w for ROWS rows of x and 16 rows of w, w_stride apart: out[r * out_stride + row]. `in` is a multiple of
// 16. Rows of w that lie `ahead` numbers further on are fetched into the cache. `scale`, if there is one, is that of
// each 128 columns.
template <int ROWS, class T>
inline void dot_tile(const bf16* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t in, const float* scale,
                     float* out, int64_t out_stride, int64_t ahead) {
    __m512 sum[ROWS], other[ROWS], total[ROWS];  // two, for a multiplication waits for the one before it in the same sum
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) sum[r] = other[r] = total[r] = _mm512_setzero_ps();
    Rows<bf16, ROWS> left(x, x_stride);
    Rows<T> right(w, w_stride);
    constexpr bool scaled = sizeof(T) == 1;
    for (int64_t first = 0; first < in; first += scaled ? SCALED : in) {
        const int64_t columns = scaled ? std::min(SCALED, in - first) : in;
        for (int64_t k = 0; k < columns; k += LANES) {
            __m512i pairs[8];
            turn_panel(right, pairs);
            if (ahead && k % (64 / sizeof(T)) == 0)
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++) _mm_prefetch((const char*)(right[i] + ahead), _MM_HINT_T1);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) add_products(sum[r], pairs[j], left[r] + 2 * j);
#pragma GCC unroll 16
                for (int r = 0; r < ROWS; r++) add_products(other[r], pairs[4 + j], left[r] + 8 + 2 * j);
            }
            left.advance(LANES);
            right.advance(LANES);
        }
        if (scaled) {
            const __m512 by = _mm512_set1_ps(scale[first / SCALED]);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; r++) {
                total[r] = _mm512_fmadd_ps(_mm512_add_ps(sum[r], other[r]), by, total[r]);
                sum[r] = other[r] = _mm512_setzero_ps();
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++)
        _mm512_storeu_ps(out + r * out_stride, scaled ? total[r] : _mm512_add_ps(sum[r], other[r]));
}

// The same for up to PASS rows of x.
template <class T>
[[gnu::noinline]] void dot(const bf16* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride, int64_t in,
                           const float* scale, float* out, int64_t out_stride, int64_t ahead) {
    switch (rows) {
        case 1: return dot_tile<1>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
        case 2: return dot_tile<2>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
        case 3: return dot_tile<3>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
        case 4: return dot_tile<4>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
        case 5: return dot_tile<5>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
        case 6: return dot_tile<6>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
        case 7: return dot_tile<7>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
        default: return dot_tile<8>(x, x_stride, w, w_stride, in, scale, out, out_stride, ahead);
    }
}

// ROWS rows of x with PANELS panels that `turn_panel` has turned, `panel_stride` pairs apart; out [ROWS, PANELS, 16], rows
// `out_stride` apart.
template <int ROWS, int PANELS, bool IS_SCALED>
inline void turned_tile(const bf16* x, int64_t x_stride, const Pair* w, int64_t panel_stride, int64_t in,
                        const float* const* scale, float* out, int64_t out_stride) {
    __m512 sum[ROWS][PANELS], other[ROWS][PANELS];
    float totals[ROWS][PANELS][LANES];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) {
            sum[r][p] = other[r][p] = _mm512_setzero_ps();
            if (IS_SCALED) _mm512_storeu_ps(totals[r][p], _mm512_setzero_ps());
        }
    Rows<bf16, ROWS> left(x, x_stride);
    for (int64_t first = 0; first < in; first += IS_SCALED ? SCALED : in) {
        const int64_t columns = IS_SCALED ? std::min(SCALED, in - first) : in;
        for (int64_t k = 0; k < columns; k += LANES) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                __m512i right[PANELS];
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; p++) right[p] = _mm512_loadu_si512(w + p * panel_stride + j * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    int bits;
                    std::memcpy(&bits, left[r] + 2 * j, sizeof bits);
                    const __m512bh pair = (__m512bh)_mm512_set1_epi32(bits);
#pragma GCC unroll 2
                    for (int p = 0; p < PANELS; p++) {
                        __m512& to = j < 4 ? sum[r][p] : other[r][p];
                        to = _mm512_dpbf16_ps(to, (__m512bh)right[p], pair);
                    }
                }
            }
            left.advance(LANES);
            w += LANES / 2 * LANES;
        }
        if (IS_SCALED)
            for (int r = 0; r < ROWS; r++)
                for (int p = 0; p < PANELS; p++) {
                    const __m512 by = _mm512_set1_ps(scale[p][first / SCALED]);
                    const __m512 both = _mm512_add_ps(sum[r][p], other[r][p]);
                    _mm512_storeu_ps(totals[r][p], _mm512_fmadd_ps(both, by, _mm512_loadu_ps(totals[r][p])));
                    sum[r][p] = other[r][p] = _mm512_setzero_ps();
                }
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++)
            _mm512_storeu_ps(out + r * out_stride + p * LANES,
                             IS_SCALED ? _mm512_loadu_ps(totals[r][p]) : _mm512_add_ps(sum[r][p], other[r][p]));
}

// A panel of integers: where its codes, scales and zeros begin. `nibbles`: two codes to a byte.
struct Integers {
    const uint8_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;
};

// ROWS rows of x with PANELS panels of integers; out [ROWS, PANELS, 16]. A group's product is a whole number:
// sum of (code - zero) x = sum of code x - zero * sum of x; `minus` is that of a zero that all groups share.
template <int ROWS, int PANELS, bool NIBBLES>
inline void integer_tile(const Input& x, const Integers* w, int64_t in, int64_t group, const int32_t* minus, float* out,
                         int64_t ahead) {
    __m512 total[ROWS][PANELS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) total[r][p] = _mm512_setzero_ps();
    constexpr int STEP = NIBBLES ? 8 : 4;  // numbers of a row to 64 bytes of a panel; a group has 4 or more times as many
    const int64_t groups = in / group;
    const uint8_t* codes[PANELS];
    for (int p = 0; p < PANELS; p++) codes[p] = w[p].codes;
    Rows<int8_t, ROWS> left(x.codes, in);
    for (int64_t g = 0; g < groups; g++) {
        __m512i sum[ROWS][PANELS];
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++)
            if (w[p].zero) {
                const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w[p].zero + g * LANES)));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    sum[r][p] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(x.minus8[r * groups + g] / 8));
            } else {
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    sum[r][p] = _mm512_set1_epi32(minus[r * groups + g]);
            }
        for (int64_t k = 0; k < group; k += 4 * STEP) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512i low[PANELS], high[PANELS];
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; p++) {
                    low[p] = _mm512_loadu_si512(codes[p] + 64 * j);
                    if (ahead) _mm_prefetch((const char*)(codes[p] + 64 * j + ahead), _MM_HINT_T1);
                    if (NIBBLES) {
                        const __m512i half = _mm512_set1_epi8(0xf);
                        high[p] = _mm512_and_si512(_mm512_srli_epi16(low[p], 4), half);
                        low[p] = _mm512_and_si512(low[p], half);
                    }
                }
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    const int8_t* four = left[r] + STEP * j;
                    if (NIBBLES && !HAS_VNNI) {
#pragma GCC unroll 2
                        for (int p = 0; p < PANELS; p++) add_nibbles(sum[r][p], low[p], high[p], four);
                        continue;
                    }
#pragma GCC unroll 2
                    for (int p = 0; p < PANELS; p++) add_bytes(sum[r][p], low[p], four);
                    if (NIBBLES)
#pragma GCC unroll 2
                        for (int p = 0; p < PANELS; p++) add_bytes(sum[r][p], high[p], four + 4);
                }
            }
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; p++) codes[p] += 256;
            left.advance(4 * STEP);
        }
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) {
            const __m512 by = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(w[p].scale + g * LANES)));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                total[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][p]),
                                              _mm512_mul_ps(by, _mm512_set1_ps(x.scale[r * groups + g])), total[r][p]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; p++) _mm512_storeu_ps(out + (r * PANELS + p) * LANES, total[r][p]);
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

#define FOR_ROWS(MOST, ROWS, CALL)                                 \
    switch (ROWS) {                                                \
        case 1: { constexpr int N = 1; CALL; break; }              \
        case 2: { constexpr int N = 2; CALL; break; }              \
        case 3: { constexpr int N = 3; CALL; break; }              \
        case 4: { constexpr int N = 4; CALL; break; }              \
        case 5: { constexpr int N = 5; CALL; break; }              \
        case 6: { constexpr int N = MOST < 6 ? MOST : 6; CALL; break; } \
        case 7: { constexpr int N = MOST < 7 ? MOST : 7; CALL; break; } \
        default: { constexpr int N = MOST < 8 ? MOST : 8; CALL; }  \
    }

inline int64_t panels(const Matrix& m) { return m.out / LANES; }

inline Integers integers(const Matrix& m, int64_t panel) {
    const int64_t bytes = m.kind == INT4 ? m.in / 2 : m.in, groups = m.in / m.group * LANES;
    return {(const uint8_t*)m.data + panel * bytes * LANES, (const uint16_t*)m.scale + panel * groups,
            m.zero ? m.zero + panel * groups : nullptr};
}

inline const float* block_scales(const Matrix& m, int64_t panel) {
    return (const float*)m.scale + panel * LANES / SCALED * ((m.in + SCALED - 1) / SCALED);
}

// x's rows with one panel, or two of one matrix: finish(row, sums) gets each row's 16 (or 32) sums.
class Panels {
    const Matrix& m;
    const int64_t which[2], count;
    const uint8_t* turned[2] = {};  // unpacked for many rows

public:
    Panels(const Matrix& m, int64_t panel) : m(m), which{panel, panel}, count(1) {}
    Panels(const Matrix& m, int64_t first, int64_t second) : m(m), which{first, second}, count(2) {}

    template <class Finish>
    void multiply(const Input& x, int64_t rows, Finish finish) {
        alignas(64) float sums[PASS * 2 * LANES];
        const bool many = rows > PASS;
        if (m.kind == INT4 ? HAS_VNNI && rows > 4 * PASS : many && m.kind != INT8) unpack();
        const bool wide = m.kind >= INT8 ? count == 2 : many;
        in_passes(rows, wide ? WIDE_PASS : PASS, [&](int64_t first, int64_t n) {
            const Input from = x.from(first);
            if (m.kind >= INT8)
                times_integers(from, n, sums, first == 0);
            else if (many)
                times_turned(from, n, sums);
            else
                for (int64_t i = 0; i < count; i++) times_rows(from, n, i, sums + i * LANES, first == 0);
            for (int64_t r = 0; r < n; r++) finish(first + r, sums + r * count * LANES);
        });
    }

private:
    void times_rows(const Input& x, int64_t n, int64_t i, float* out, bool fetch) const {
        const int64_t at = which[i] * LANES * m.in, stride = count * LANES, ahead = fetch ? LANES * m.in : 0;
        if (m.kind == FP8)
            dot(x.paired, x.in, n, (const uint8_t*)m.data + at, m.in, m.in, block_scales(m, which[i]), out, stride, ahead);
        else
            dot(x.x, x.stride, n, (const bf16*)m.data + at, m.in, m.in, nullptr, out, stride, ahead);
    }

    void times_turned(const Input& x, int64_t n, float* out) const {
        const float* scales[2] = {};
        if (m.kind == FP8)
            for (int i = 0; i < 2; i++) scales[i] = block_scales(m, which[i]);
        const Pair* w = (const Pair*)turned[0];
        const bf16* from = m.kind == FP8 ? x.paired : x.x;
        const int64_t stride = m.kind == FP8 ? x.in : x.stride;
        const int64_t apart = m.in / 2 * LANES;
#define TURNED(PANELS, SCALED) FOR_ROWS(6, n, (turned_tile<N, PANELS, SCALED>(from, stride, w, apart, m.in, scales, out, PANELS * LANES)))
        if (m.kind == FP8 && count == 2) TURNED(2, true)
        else if (m.kind == FP8) TURNED(1, true)
        else if (count == 2) TURNED(2, false)
        else TURNED(1, false)
#undef TURNED
    }

    void times_integers(const Input& x, int64_t n, float* out, bool fetch) const {
        Integers w[2];
        for (int i = 0; i < 2; i++) {
            w[i] = integers(m, which[i]);
            if (turned[i]) w[i].codes = turned[i];
        }
        const bool nibbles = m.kind == INT4 && !turned[0];
        const int32_t* minus = m.kind == INT4 ? x.minus8 : x.minus128;
        const int64_t ahead = fetch && !turned[0] ? 2048 : 0;
#define INTEGERS(MOST, PANELS, NIBBLES) \
    FOR_ROWS(MOST, n, (integer_tile<N, PANELS, NIBBLES>(x, w, m.in, m.group, minus, out, ahead)))
        if (nibbles && count == 2) INTEGERS(6, 2, true)
        else if (nibbles) INTEGERS(8, 1, true)
        else if (count == 2) INTEGERS(6, 2, false)
        else INTEGERS(8, 1, false)
#undef INTEGERS
    }

    void unpack() {
        thread_local Scratch scratch;
        const int64_t size = m.kind == INT4 ? m.in * LANES : m.in * LANES * 2;
        scratch.reserve(2 * Scratch::bytes<uint8_t>(size));
        uint8_t* to = scratch.take<uint8_t>(2 * size);
        for (int64_t i = 0; i < count; i++, to += size) {
            turned[i] = to;
            if (m.kind == INT4)
                spread((const uint8_t*)integers(m, which[i]).codes, to);
            else if (m.kind == FP8)
                turn((const uint8_t*)m.data + which[i] * LANES * m.in, to);
            else
                turn((const bf16*)m.data + which[i] * LANES * m.in, to);
        }
    }

    template <class T>
    void turn(const T* from, uint8_t* to) const {
        Rows<T> rows(from, m.in);
        for (int64_t k = 0; k < m.in; k += LANES) {
            __m512i pairs[8];
            turn_panel(rows, pairs);
            for (int j = 0; j < 8; j++, to += 64) _mm512_store_si512(to, pairs[j]);
            rows.advance(LANES);
        }
    }

    void spread(const uint8_t* from, uint8_t* to) const {
        const __m512i half = _mm512_set1_epi8(0xf);
        for (int64_t k = 0; k < m.in; k += 8, from += 64, to += 128) {
            const __m512i both = _mm512_loadu_si512(from);
            _mm512_store_si512(to, _mm512_and_si512(both, half));
            _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), half));
        }
    }
};

}  // namespace
}  // namespace dsv3
