// Drawing a word for each of several requests (sampling.py says what is computed), one row after the other.
//
// Weights are exp((logit - largest) / temperature), so the likeliest word has weight 1. A rule is a place in the order
// of weights, and to find it no order is needed: words are counted and added up by the leading bits of their weights,
// eight bins to an octave, and only the bin in which the place lies is sorted. Most words weigh next to nothing, so all
// this is done with those above a bound first, and with a lower one only where a rule reaches beyond it.

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace dsv3 {
namespace {

constexpr int BITS = 20;  // of a weight that do not choose its bin

inline uint32_t bits_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return bits;
}

class Words {
  public:
    std::vector<int64_t> ids;  // of the words above a bound, in the order of the vocabulary
    std::vector<float> weights;
    double total;

    void gather(const float* weight, int64_t vocab, float bound) {
        ids.clear();
        weights.clear();
        std::fill(count.begin(), count.end(), 0);
        std::fill(sum.begin(), sum.end(), 0.0);
        total = 0;
        for (int64_t i = 0; i < vocab; i += LANES) {
            const __mmask16 there = i + LANES <= vocab ? 0xffff : __mmask16((1u << (vocab - i)) - 1);
            const __m512 some = _mm512_maskz_loadu_ps(there, weight + i);
            uint32_t found = _mm512_mask_cmp_ps_mask(there, some, _mm512_set1_ps(bound), _CMP_GT_OQ);
            for (; found; found &= found - 1) {
                const int64_t id = i + __builtin_ctz(found);
                const uint32_t bin = bits_of(weight[id]) >> BITS;
                ids.push_back(id);
                weights.push_back(weight[id]);
                count[bin]++;
                sum[bin] += weight[id];
                total += weight[id];
            }
        }
    }

    // The least weight of the first words, in falling order, up to which `go_on(how many, their sum)` of those before
    // holds; at least the first. Words that weigh the same are in or out together.
    template <class GoOn>
    float least(GoOn go_on) {
        int64_t before = 0;
        double added = 0;
        float last = 1.0f;
        for (uint32_t bin = bits_of(1.0f) >> BITS; bin > 0; bin--) {
            if (!count[bin]) continue;
            if (!go_on(before, added)) break;
            if (go_on(before + count[bin] - 1, added + sum[bin])) {  // all of them, then
                last = least_of(bin);
            } else {
                members.clear();
                for (float w : weights)
                    if (bits_of(w) >> BITS == bin) members.push_back(w);
                std::sort(members.begin(), members.end(), std::greater<float>());
                double reached = added;
                for (size_t i = 0; i < members.size() && go_on(before + int64_t(i), reached); i++) {
                    last = members[i];
                    reached += last;
                }
                break;
            }
            before += count[bin];
            added += sum[bin];
        }
        return last;
    }

    double sum_from(float least) const {
        double some = 0;
        for (float w : weights) some += w >= least ? w : 0;
        return some;
    }

  private:
    static float least_of(uint32_t bin) {
        const uint32_t bits = bin << BITS;
        float weight;
        std::memcpy(&weight, &bits, 4);
        return weight;
    }

    std::vector<float> members;
    std::vector<int64_t> count = std::vector<int64_t>(1 << (32 - BITS));
    std::vector<double> sum = std::vector<double>(1 << (32 - BITS));
};

// Fills weight [vocab] and returns its sum, whose order of addition depends on the row alone; not a number where no
// logit is a finite largest one.
double weigh(const float* logits, float* weight, int64_t vocab, float temperature) {
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    __m512 largest = nothing;
    __mmask16 broken = 0;
    for (int64_t i = 0; i < vocab; i += LANES) {
        const __mmask16 there = i + LANES <= vocab ? 0xffff : __mmask16((1u << (vocab - i)) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(there, logits + i);
        broken |= _mm512_mask_cmp_ps_mask(there, x, x, _CMP_UNORD_Q);
        largest = _mm512_mask_max_ps(largest, there, largest, x);
    }
    const float most = _mm512_reduce_max_ps(largest);
    if (broken || !std::isfinite(most)) return __builtin_nan("");
    const __m512 top = _mm512_set1_ps(most), scale = _mm512_set1_ps(1.0f / temperature);
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int64_t i = 0; i < vocab; i += LANES) {
        const __mmask16 there = i + LANES <= vocab ? 0xffff : __mmask16((1u << (vocab - i)) - 1);
        const __m512 x = _mm512_maskz_loadu_ps(there, logits + i);
        const __mmask16 possible = _mm512_mask_cmp_ps_mask(there, x, nothing, _CMP_GT_OQ);
        const __m512 w = _mm512_maskz_mov_ps(possible, exponential(_mm512_mul_ps(_mm512_sub_ps(x, top), scale)));
        _mm512_mask_storeu_ps(weight + i, there, w);
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(w)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(w, 1)));
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

// The word at which the running sum passes `target`, where no rule leaves any out; the last one if none does.
int64_t passes(const float* weight, int64_t vocab, double target) {
    double sum = 0;
    int64_t last = -1;
    for (int64_t i = 0; i < vocab; i += LANES) {
        const __mmask16 there = i + LANES <= vocab ? 0xffff : __mmask16((1u << (vocab - i)) - 1);
        const __m512 some = _mm512_maskz_loadu_ps(there, weight + i);
        uint32_t found = _mm512_mask_cmp_ps_mask(there, some, _mm512_setzero_ps(), _CMP_GT_OQ);
        if (!found) continue;
        const double after = sum + _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(some)),
                                                                      _mm512_cvtps_pd(_mm512_extractf32x8_ps(some, 1))));
        const bool here = after > target;
        for (; here && found && sum <= target; found &= found - 1) {
            last = i + __builtin_ctz(found);
            sum += weight[last];
        }
        if (here) return last;
        last = i + 31 - __builtin_clz(found);
        sum = after;
    }
    return last;
}

}  // namespace

// logits [rows, vocab]; temperature, top_k (0: all), top_p, min_p and uniform, one of each a row; ids [rows] is
// the result, -1 where there is nothing to draw from.
extern "C" void draw(const float* logits, const float* temperature, const int64_t* top_k, const double* top_p,
                     const float* min_p, const double* uniform, int64_t* ids, int64_t rows, int64_t vocab) {
    std::vector<float> weight(vocab);
    Words words;
    for (int64_t row = 0; row < rows; row++) {
        const double all = weigh(logits + row * vocab, weight.data(), vocab, temperature[row]);
        if (std::isnan(all)) {
            ids[row] = -1;
            continue;
        }
        const bool limited = top_k[row] > 0 && top_k[row] < vocab, shared = top_p[row] < 1;
        if (!limited && !shared && min_p[row] <= 0) {
            ids[row] = passes(weight.data(), vocab, uniform[row] * all);
            continue;
        }
        for (float bound : {0x1p-8f, 0x1p-16f, 0.0f}) {
            words.gather(weight.data(), vocab, bound);
            if (limited ? int64_t(words.ids.size()) >= top_k[row] : shared && words.total >= top_p[row] * all) break;
            if (!limited && bound < min_p[row]) break;
        }
        float least = min_p[row];  // times the largest, which is 1
        double total = all;
        if (limited) {
            const float last = words.least([&](int64_t before, double) { return before < top_k[row]; });
            total = words.sum_from(last);
            least = std::max(least, last);
        }
        if (shared) {
            const double share = top_p[row] * total;
            least = std::max(least, words.least([&](int64_t, double before) { return before < share; }));
        }
        const double target = uniform[row] * words.sum_from(least);
        double sum = 0;
        for (size_t i = 0; i < words.ids.size() && sum <= target; i++) {
            if (words.weights[i] < least) continue;
            ids[row] = words.ids[i];
            sum += words.weights[i];
        }
    }
}
}  // namespace dsv3
