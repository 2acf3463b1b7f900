// What both native sources stand on: bfloat16 in memory, float32 in vectors of 16.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

using bf16 = uint16_t;
using Pair = uint32_t;  // two neighbours in the direction that a product sums over, as vdpbf16ps wants them

namespace {

constexpr int64_t LANES = 16;

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// exp(x) of x <= 104, to two units in the last place: 2^n times a polynomial in the rest, |rest| <= ln 2 / 2 (Cephes'
// expf). NaN stays NaN, for max and min give back their second operand where either is one.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 minus = _mm512_min_ps(_mm512_set1_ps(104.0f), _mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(minus)));
}

// Turns pairs of a row of `rotary` numbers by angles given as cosines and sines. Neighbours are a pair, or if not
// `interleave` numbers half a row apart; the result holds all first members, then all second ones.
inline void rotate(const bf16* from, bf16* to, const float* cos, const float* sin, int64_t rotary, bool interleave) {
    const int64_t half = rotary / 2;
    for (int64_t j = 0; j < half; j += LANES) {
        __m512 a, b;
        if (interleave) {
            const __m512i pairs = _mm512_loadu_si512(from + 2 * j);
            a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
        } else {
            a = load(from + j);
            b = load(from + half + j);
        }
        const __m512 c = _mm512_loadu_ps(cos + j), s = _mm512_loadu_ps(sin + j);
        store(to + j, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        store(to + half + j, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

}  // namespace
