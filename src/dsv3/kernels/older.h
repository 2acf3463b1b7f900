// What older processors lack of AVX-512, made of what they have, under the same names. The kernels are written once, for
// AVX-512 with its instructions for bf16 and bytes; declared in their namespace, what is here hides the compiler's own.
//
//   without AVX-512 (every x86 since 2013 has AVX2)      a vector of 16 numbers is two of 8
//   without AVX512-BF16 (before 2021, and laptops)       a product of pairs of bf16 is two of float32
//   without VNNI (before 2019)                           a product of bytes is one of 16-bit numbers
//
// Only what the kernels use is here, with the immediate operands that they use.

#pragma once

#include <immintrin.h>

#include <cstdint>

#ifndef __AVX512F__
#undef _mm512_setr_epi32  // which are macros with some compilers
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_srai_epi16
#undef _mm512_shuffle_i32x4
#undef _mm512_inserti32x4
#undef _mm512_inserti64x4
#undef _mm512_roundscale_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_ternarylogic_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_cmp_ps_mask
#endif

#define INLINE [[gnu::always_inline]] inline  // as the compiler's own are

namespace dsv3 {
namespace {

#ifndef __AVX512F__

struct __m512 {
    __m256 low, high;
};
struct __m512i {
    __m256i low, high;
};
struct __m512d {
    __m256d low, high;
};
using __mmask16 = uint16_t;

#define BOTH(TYPE, NAME, HALF) \
    INLINE TYPE _mm512_##NAME(TYPE a, TYPE b) { return {_mm256_##HALF(a.low, b.low), _mm256_##HALF(a.high, b.high)}; }
BOTH(__m512, add_ps, add_ps)
BOTH(__m512, sub_ps, sub_ps)
BOTH(__m512, mul_ps, mul_ps)
BOTH(__m512, div_ps, div_ps)
BOTH(__m512, max_ps, max_ps)
BOTH(__m512, min_ps, min_ps)
BOTH(__m512d, add_pd, add_pd)
BOTH(__m512i, add_epi16, add_epi16)
BOTH(__m512i, add_epi32, add_epi32)
BOTH(__m512i, mullo_epi32, mullo_epi32)
BOTH(__m512i, madd_epi16, madd_epi16)
BOTH(__m512i, maddubs_epi16, maddubs_epi16)
BOTH(__m512i, and_si512, and_si256)
BOTH(__m512i, or_si512, or_si256)
BOTH(__m512i, shuffle_epi8, shuffle_epi8)
BOTH(__m512i, unpacklo_epi16, unpacklo_epi16)
BOTH(__m512i, unpackhi_epi16, unpackhi_epi16)
BOTH(__m512i, unpacklo_epi32, unpacklo_epi32)
BOTH(__m512i, unpackhi_epi32, unpackhi_epi32)
BOTH(__m512i, unpacklo_epi64, unpacklo_epi64)
BOTH(__m512i, unpackhi_epi64, unpackhi_epi64)
#undef BOTH

#define BOTH(NAME)                                                                           \
    INLINE __m512 _mm512_##NAME(__m512 a, __m512 b, __m512 c) {                              \
        return {_mm256_##NAME(a.low, b.low, c.low), _mm256_##NAME(a.high, b.high, c.high)}; \
    }
BOTH(fmadd_ps)
BOTH(fmsub_ps)
BOTH(fnmadd_ps)
#undef BOTH

#define BOTH(NAME) \
    INLINE __m512i _mm512_##NAME(__m512i a, int by) { return {_mm256_##NAME(a.low, by), _mm256_##NAME(a.high, by)}; }
BOTH(slli_epi16)
BOTH(slli_epi32)
BOTH(srli_epi16)
BOTH(srli_epi32)
BOTH(srai_epi16)
#undef BOTH

#define BOTH(TYPE, NAME, OF, HALF)                   \
    INLINE TYPE _mm512_##NAME(OF x) {                \
        const auto half = _mm256_##HALF(x);          \
        return {half, half};                         \
    }
BOTH(__m512, set1_ps, float, set1_ps)
BOTH(__m512i, set1_epi8, int8_t, set1_epi8)
BOTH(__m512i, set1_epi16, int16_t, set1_epi16)
BOTH(__m512i, set1_epi32, int, set1_epi32)
BOTH(__m512i, broadcast_i32x4, __m128i, broadcastsi128_si256)
#undef BOTH

INLINE __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE __m512d _mm512_setzero_pd() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
INLINE __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l,
                                 int m, int n, int o, int p) {
    return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}
INLINE __m512i _mm512_set4_epi32(int d, int c, int b, int a) {
    return _mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
}

// Memory
INLINE __m512 _mm512_loadu_ps(const void* p) {
    return {_mm256_loadu_ps((const float*)p), _mm256_loadu_ps((const float*)p + 8)};
}
INLINE __m512 _mm512_load_ps(const void* p) { return _mm512_loadu_ps(p); }
INLINE __m512i _mm512_loadu_si512(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE __m512i _mm512_load_si512(const void* p) { return _mm512_loadu_si512(p); }
INLINE void _mm512_storeu_ps(void* p, __m512 x) {
    _mm256_storeu_ps((float*)p, x.low);
    _mm256_storeu_ps((float*)p + 8, x.high);
}
INLINE void _mm512_store_ps(void* p, __m512 x) { _mm512_storeu_ps(p, x); }
INLINE void _mm512_storeu_si512(void* p, __m512i x) {
    _mm256_storeu_si256((__m256i*)p, x.low);
    _mm256_storeu_si256((__m256i*)p + 1, x.high);
}
INLINE void _mm512_store_si512(void* p, __m512i x) { _mm512_storeu_si512(p, x); }

// Masks: a bit a number, or all bits of the number.
INLINE __m512i spread(__mmask16 mask) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i low = _mm256_and_si256(_mm256_set1_epi32(mask), bits);
    const __m256i high = _mm256_and_si256(_mm256_set1_epi32(mask >> 8), bits);
    return {_mm256_cmpeq_epi32(low, bits), _mm256_cmpeq_epi32(high, bits)};
}
INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
    const auto compare = [how](__m256 x, __m256 y) {
        if (how == _CMP_GT_OQ) return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ));
        return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_UNORD_Q));
    };
    return __mmask16(compare(a.low, b.low) | compare(a.high, b.high) << 8);
}
INLINE __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int how) {
    return mask & _mm512_cmp_ps_mask(a, b, how);
}
INLINE __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
    const __m512i all = spread(mask);
    return {_mm256_and_ps(x.low, _mm256_castsi256_ps(all.low)), _mm256_and_ps(x.high, _mm256_castsi256_ps(all.high))};
}
INLINE __m512 _mm512_mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 x) {
    const __m512i all = spread(mask);
    return {_mm256_blendv_ps(otherwise.low, x.low, _mm256_castsi256_ps(all.low)),
            _mm256_blendv_ps(otherwise.high, x.high, _mm256_castsi256_ps(all.high))};
}
INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
    const __m512i all = spread(mask);
    return {_mm256_maskload_ps((const float*)p, all.low), _mm256_maskload_ps((const float*)p + 8, all.high)};
}
INLINE __m512 _mm512_mask_load_ps(__m512 otherwise, __mmask16 mask, const void* p) {
    return _mm512_mask_mov_ps(otherwise, mask, _mm512_maskz_loadu_ps(mask, p));
}
INLINE void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 x) {
    const __m512i all = spread(mask);
    _mm256_maskstore_ps((float*)p, all.low, x.low);
    _mm256_maskstore_ps((float*)p + 8, all.high, x.high);
}
INLINE __m512 _mm512_mask_max_ps(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b) {
    return _mm512_mask_mov_ps(otherwise, mask, _mm512_max_ps(a, b));
}

// Parts
INLINE __m512 _mm512_castsi512_ps(__m512i x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
INLINE __m512i _mm512_castps_si512(__m512 x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
INLINE __m512i _mm512_castsi256_si512(__m256i x) { return {x, x}; }
INLINE __m512i _mm512_castsi128_si512(__m128i x) { return _mm512_castsi256_si512(_mm256_castsi128_si256(x)); }
INLINE __m256i _mm512_castsi512_si256(__m512i x) { return x.low; }
INLINE __m256 _mm512_castps512_ps256(__m512 x) { return x.low; }
INLINE __m256 _mm512_extractf32x8_ps(__m512 x, int which) { return which ? x.high : x.low; }
INLINE __m512i _mm512_inserti64x4(__m512i x, __m256i part, int where) {
    return where ? __m512i{x.low, part} : __m512i{part, x.high};
}
INLINE __m512i _mm512_inserti32x4(__m512i x, __m128i part, int where) {
    __m256i& half = where < 2 ? x.low : x.high;
    half = where % 2 ? _mm256_inserti128_si256(half, part, 1) : _mm256_inserti128_si256(half, part, 0);
    return x;
}
// Quarters 0 and 2 of each (0x88), or 1 and 3 (0xdd).
INLINE __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) {
    const auto evens = [](__m512i x) { return _mm256_permute2x128_si256(x.low, x.high, 0x20); };
    const auto odds = [](__m512i x) { return _mm256_permute2x128_si256(x.low, x.high, 0x31); };
    return which == 0x88 ? __m512i{evens(a), evens(b)} : __m512i{odds(a), odds(b)};
}
INLINE __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    const auto half = [&](__m256i at) {
        const __m256 of_16 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 27));  // this bit of the index as a sign
        const __m256 of_8 = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
        const auto pick = [&](__m512 x) {
            return _mm256_blendv_ps(_mm256_permutevar8x32_ps(x.low, at), _mm256_permutevar8x32_ps(x.high, at), of_8);
        };
        return _mm256_blendv_ps(pick(a), pick(b), of_16);
    };
    return {half(index.low), half(index.high)};
}
// Any function of three bits; those that the kernels use.
INLINE __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int truth) {
    const auto half = [truth](__m256i x, __m256i y, __m256i z) {
        return truth == 0xf8   ? _mm256_or_si256(x, _mm256_and_si256(y, z))
               : truth == 0xf4 ? _mm256_or_si256(x, _mm256_andnot_si256(z, y))
                               : _mm256_xor_si256(x, _mm256_and_si256(y, z));  // 0x78
    };
    return {half(a.low, b.low, c.low), half(a.high, b.high, c.high)};
}

// Conversions
INLINE __m128i upper(__m256i x) { return _mm256_extracti128_si256(x, 1); }
INLINE __m512i _mm512_cvtepu16_epi32(__m256i x) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(upper(x))};
}
INLINE __m512i _mm512_cvtepu8_epi32(__m128i x) {
    return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
INLINE __m512 _mm512_cvtepi32_ps(__m512i x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
INLINE __m512i _mm512_cvtps_epi32(__m512 x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
INLINE __m512 _mm512_cvtph_ps(__m256i x) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(upper(x))};
}
INLINE __m512d _mm512_cvtps_pd(__m256 x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
INLINE __m128i _mm512_cvtsepi32_epi8(__m512i x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), upper(words));
}
INLINE __m256i _mm512_cvtepi32_epi16(__m512i x) {  // of numbers below 2^16
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0xd8);
}

// Arithmetic
INLINE __m512 _mm512_sqrt_ps(__m512 x) { return {_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)}; }
INLINE __m512 _mm512_abs_ps(__m512 x) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
INLINE __m512 _mm512_roundscale_ps(__m512 x, int) { return {_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }
// x * 2^n for whole |n| < 252: in two steps, for one may lie beyond what float32 has.
INLINE __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
    const auto half = [](__m256 y, __m256 m) {
        const __m256i all = _mm256_cvtps_epi32(m), first = _mm256_srai_epi32(all, 1);
        const auto power = [](__m256i e) {
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
        };
        return _mm256_mul_ps(_mm256_mul_ps(y, power(first)), power(_mm256_sub_epi32(all, first)));
    };
    return {half(x.low, n.low), half(x.high, n.high)};
}
INLINE float _mm512_reduce_add_ps(__m512 x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float _mm512_reduce_max_ps(__m512 x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE int _mm512_reduce_add_epi32(__m512i x) {
    const __m256i eight = _mm256_add_epi32(x.low, x.high);
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), upper(eight));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xee));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}
INLINE double _mm512_reduce_add_pd(__m512d x) {
    const __m256d four = _mm256_add_pd(x.low, x.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

#endif  // without AVX-512

#ifndef __AVX512BF16__

using __m512bh = __m512i;

// sum + a's first of each pair times b's first + a's second times b's second.
INLINE __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const __m512i upper_half = _mm512_set1_epi32(int(0xffff0000u));
    const auto first = [](__m512bh x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    const auto second = [&](__m512bh x) { return _mm512_castsi512_ps(_mm512_and_si512(x, upper_half)); };
    return _mm512_fmadd_ps(second(a), second(b), _mm512_fmadd_ps(first(a), first(b), sum));
}

// To the nearest bf16, of two to the even one. What is not a number stays so.
INLINE __m256i _mm512_cvtneps_pbh(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), half = _mm512_set1_epi32(0x7fff);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512 near = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_add_epi32(bits, half), odd));
    near = _mm512_mask_mov_ps(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_nanf("")));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(near), 16));
}

#endif

#if defined __AVX512VNNI__ || defined __AVXVNNI__
constexpr bool HAS_VNNI = true;
#else
constexpr bool HAS_VNNI = false;
#endif

#ifndef __AVX512VNNI__

// sum + four products of bytes, a's without a sign and b's with one. Two such products may be more than 16 bits hold.
INLINE __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
#if defined __AVXVNNI__ && !defined __AVX512F__
    return {_mm256_dpbusd_avx_epi32(sum.low, a.low, b.low), _mm256_dpbusd_avx_epi32(sum.high, a.high, b.high)};
#else
    const __m512i evens = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(0xff)),
                                            _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
    const __m512i odds = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
    return _mm512_add_epi32(_mm512_add_epi32(sum, evens), odds);
#endif
}

#endif

}  // namespace
}  // namespace dsv3

#undef INLINE
