// What all native sources stand on: bfloat16 in memory, float32 in vectors of 16. They are written for AVX-512 and its
// products of bf16 and of bytes; older.h makes what a processor lacks of what it has.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "older.h"

namespace dsv3 {

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

// A size of e4m3, seven bits, as bf16, which holds it exactly.
constexpr int size_of(int code) {
    constexpr uint16_t small[8] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // below 2^-6
    return code < 8 ? small[code] : code < 127 ? (code << 4) + (120 << 7) : 0x7fc0;
}

#ifdef __AVX512VBMI__
// The upper bytes of all sizes, and the lower ones.
struct Sizes {
    alignas(64) uint8_t upper[128], lower[128];
    constexpr Sizes() : upper(), lower() {
        for (int code = 0; code < 128; code++) {
            upper[code] = uint8_t(size_of(code) >> 8);
            lower[code] = uint8_t(size_of(code));
        }
    }
};
#else
// The same in tables of 16, by the code's upper and lower four bits. All codes but the first 16 and the last one are
// (code << 4) + (120 << 7): an upper byte that the upper four bits tell, a lower byte that the lower four do. What else
// there is of the first 16 is masked by `first`, of the last by `last`.
struct Sizes {
    alignas(16) uint8_t upper[16], first[16], last[16], upper_of_first[16], lower_of_first[16], upper_of_last[16];
    constexpr Sizes() : upper(), first(), last(), upper_of_first(), lower_of_first(), upper_of_last() {
        for (int i = 0; i < 16; i++) {
            const int high = i & 7, sign = (i & 8) << 4;
            upper[i] = uint8_t(sign | (high ? 120 / 2 + high : 0));
            first[i] = high ? 0 : 0xff;
            last[i] = high == 7 ? 0xff : 0;
            upper_of_first[i] = uint8_t(size_of(i) >> 8);
            lower_of_first[i] = uint8_t(size_of(i) ^ i << 4);
            upper_of_last[i] = i == 15 ? 0x7f : 0;
        }
    }
};
#endif
inline constexpr Sizes SIZES;

// Of every four bytes, e4m3 numbers, the first and third (in `even`) and the second and fourth (in `odd`) as pairs of
// bf16.
inline void widen_e4m3(__m512i fours, __m512i& even, __m512i& odd) {
    const __m512i first_byte = _mm512_set1_epi16(0x00ff);
#ifdef __AVX512VBMI__
    const auto look_up = [&](const uint8_t* table) {  // by the lower seven bits of each byte
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), fours, _mm512_load_si512(table + 64));
    };
    const __m512i lower = look_up(SIZES.lower), sign = _mm512_set1_epi8(int8_t(0x80));
    const __m512i upper = _mm512_ternarylogic_epi32(look_up(SIZES.upper), fours, sign, 0xf8);  // or fours & sign
#else
    const __m512i half = _mm512_set1_epi8(0xf), right = _mm512_and_si512(fours, half);
    const __m512i left = _mm512_and_si512(_mm512_srli_epi16(fours, 4), half);
    const auto look_up = [](const uint8_t* table, __m512i by) {
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), by);
    };
    const __m512i first = look_up(SIZES.first, left), last = look_up(SIZES.last, left);
    const __m512i lower = _mm512_ternarylogic_epi32(_mm512_slli_epi16(right, 4), look_up(SIZES.lower_of_first, right),
                                                    first, 0x78);  // xor (the look-up & first)
    __m512i upper = look_up(SIZES.upper, left);
    upper = _mm512_ternarylogic_epi32(upper, look_up(SIZES.upper_of_first, right), first, 0xf8);
    upper = _mm512_ternarylogic_epi32(upper, look_up(SIZES.upper_of_last, right), last, 0xf8);
#endif
    even = _mm512_ternarylogic_epi32(_mm512_slli_epi16(upper, 8), lower, first_byte, 0xf8);
    odd = _mm512_ternarylogic_epi32(_mm512_srli_epi16(lower, 8), upper, first_byte, 0xf4);  // or upper & ~first_byte
}

// Every four numbers in the order in which `widen_e4m3` pairs them: first, third, second, fourth.
inline __m512i as_paired(__m512i numbers) {
    return _mm512_shuffle_epi8(numbers, _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100));
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
}  // namespace dsv3
