// The arithmetic of local response normalization: powers, windows and their sums.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace fastalex::cpu::FASTALEX_ISA {

enum class Beta { kThreeQuarters, kHalf, kOne, kAny };

#if defined(__AVX2__)
inline F32 estimated_rsqrt(F32 s) {
#if defined(__AVX512F__)
  return (F32)_mm512_rsqrt14_ps((__m512)s);
#else
  return (F32)_mm256_rsqrt_ps((__m256)s);
#endif
}

// Whether every lane is a positive normal number: what the estimates are good for.
inline bool all_positive_normal(F32 s) {
#if defined(__AVX512DQ__)
  constexpr int kEveryOtherClass = 0xff;  // NaN, zero, infinite, subnormal or negative
  return _mm512_fpclass_ps_mask((__m512)s, kEveryOtherClass) == 0;
#else
  return all((s >= FLT_MIN) & (s <= FLT_MAX));
#endif
}

// s^-3/4 for normal s, without a root or a division. The hardware's estimates give p within 2^-10;
// with e = 1 - s^3 p^4, s^-3/4 = p (1 - e)^-1/4 = p (1 + e/4 + 5/32 e^2 + ...), whose next term is
// below 2^-27. Worst error 2.25 * 2^-24: five roundings inside e count a quarter each, the last one
// whole.
inline F32 fast_inverse_three_quarter_power(F32 s) {
  const F32 r = estimated_rsqrt(s);
  const F32 p = (r * r) * estimated_rsqrt(r);
  const F32 sp = s * p;
  const F32 e = fused_multiply_add(sp * sp, -(sp * p), broadcast(1.0f));
  return fused_multiply_add(p * e, fused_multiply_add(e, broadcast(0.15625f), broadcast(0.25f)), p);
}
#endif

template <class A>
inline Vec<A> inverse_three_quarter_power(Vec<A> s) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    if (__builtin_expect(all_positive_normal(s), 1)) {
      return fast_inverse_three_quarter_power(s);
    }
  }
#endif
  const Vec<A> root = square_root<A>(s);
  return A(1) / (root * square_root<A>(root));
}

// s^-beta
template <Beta kBeta, class A>
inline Vec<A> inverse_power(Vec<A> s, A beta) {
  if constexpr (kBeta == Beta::kThreeQuarters) return inverse_three_quarter_power<A>(s);
  if constexpr (kBeta == Beta::kHalf) return A(1) / square_root<A>(s);
  if constexpr (kBeta == Beta::kOne) return A(1) / s;
  for (int lane = 0; lane < kLanes<A>; ++lane) s[lane] = std::pow(s[lane], -beta);
  return s;
}

// LrnParams in the compute type, with the window already clipped to what a group can hold.
template <class A>
struct LrnWindow {
  A scale, beta, k;
  int64_t group_channels, groups;
  int64_t before, after;  // the window of channel c is [c - before, c + after]

  LrnWindow(const LrnParams& p, int64_t channels)
      : scale(static_cast<A>(p.scale)),
        beta(static_cast<A>(p.beta)),
        k(static_cast<A>(p.k)),
        group_channels(channels / p.groups),
        groups(p.groups),
        before(std::min(p.size / 2, std::max<int64_t>(group_channels - 1, 0))),
        after(std::min(p.size - 1 - p.size / 2, std::max<int64_t>(group_channels - 1, 0))) {}

  int64_t size() const { return before + after + 1; }

  // k + scale * sum of squares
  Vec<A> base(Vec<A> sum) const { return fused_multiply_add(broadcast(scale), sum, broadcast(k)); }
};

// The sum of `size` vectors that start one element apart.
template <class A>
inline Vec<A> window_sum(const A* first, int64_t size) {
  Vec<A> sum = load(first);
  for (int64_t j = 1; j < size; ++j) sum += load(first + j);
  return sum;
}

}  // namespace fastalex::cpu::FASTALEX_ISA
