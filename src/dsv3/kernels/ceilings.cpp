// What a processor does with nothing else to do: how fast all threads together read memory, and how fast they multiply
// numbers in registers. `dsv3 bench` holds what a model reaches against these.

#include "vectors.h"

namespace dsv3 {
namespace {

// Sums that are in flight at once, more than a product takes cycles; as many as fit registers beside their operands.
#ifdef __AVX512F__
constexpr int ROWS = 4, COLUMNS = 3;
#else
constexpr int ROWS = 2, COLUMNS = 2;
#endif

inline float add_up(__m512 x) { return _mm512_reduce_add_ps(x); }
inline float add_up(__m512i x) { return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(x)); }

// Tells the compiler that x may be anything now, or it would multiply once and for all.
inline void forget(__m512i& x) {
#ifdef __AVX512F__
    asm volatile("" : "+v"(x));
#else
    asm volatile("" : "+x"(x.low), "+x"(x.high));
#endif
}

// sum = step(sum, left, right) for each pair of operands, `times` times over, in all threads.
template <class Vector, class Step>
void repeat(int64_t times, double* out, Step step) {
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        Vector sum[ROWS][COLUMNS];
        __m512i left[ROWS], right[COLUMNS];
#pragma GCC unroll 4
        for (__m512i& x : left) forget(x = _mm512_set1_epi32(0x01010101));
#pragma GCC unroll 4
        for (__m512i& x : right) forget(x = _mm512_set1_epi32(0x01010101));
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = step(Vector{}, left[i], right[j]);
        for (int64_t t = 0; t < times; t++) {
#pragma GCC unroll 4
            for (__m512i& x : right) forget(x);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; i++) {
                forget(left[i]);
#pragma GCC unroll 4
                for (int j = 0; j < COLUMNS; j++) sum[i][j] = step(sum[i][j], left[i], right[j]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < COLUMNS; j++) total += add_up(sum[i][j]);
    }
    *out = total;
}

}  // namespace

// The sum of n numbers at `data` into `out`, as fast as they can be read: eight places at once in each thread, which keeps
// more reads in flight than one.
extern "C" void read_all(const int64_t* data, int64_t n, int64_t* out) {
    using Eight = int64_t __attribute__((vector_size(64), aligned(8)));
    constexpr int64_t PLACES = 8, PIECE = 4096;
    const int64_t whole = n / (PLACES * PIECE) * (PLACES * PIECE);
    int64_t total = 0;
#pragma omp parallel for reduction(+ : total) schedule(static)
    for (int64_t start = 0; start < whole; start += PLACES * PIECE) {
        Eight sum[PLACES] = {};
        for (int64_t i = 0; i < PIECE; i += 8)
#pragma GCC unroll 8
            for (int64_t p = 0; p < PLACES; p++) sum[p] += *(const Eight*)(data + start + p * PIECE + i);
        for (const Eight& of_place : sum)
            for (int i = 0; i < 8; i++) total += of_place[i];
    }
    for (int64_t i = whole; i < n; i++) total += data[i];
    *out = total;
}

// out: how many multiplications a thread did in each of `times` rounds.
extern "C" void multiply_bf16(int64_t times, double* out) {
    repeat<__m512>(times, out, [](__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    });
    *out = ROWS * COLUMNS * 32;
}

extern "C" void multiply_int8(int64_t times, double* out) {
    repeat<__m512i>(times, out, [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); });
    *out = ROWS * COLUMNS * 64;
}
}  // namespace dsv3
