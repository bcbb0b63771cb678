// The arithmetic of local response normalization: powers, windows and their sums.
#pragma once
#include <algorithm>
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

// s^-3/4 for normal s, without a root or a division.
inline F32 fast_inverse_three_quarter_power(F32 s) {
#if defined(__AVX512F__)
  // From estimates r of s^-1/2 and q of r^-1/2 within 2^-14: s^-3/4 = r^2 q (1 - w)^-3/4 (1 -
  // v)^-1/2, where w = 1 - s r^2 and v = 1 - q^2 r, whose terms of second order are below 2^-25.
  // What the product r^2 q lost in rounding is added back. Worst error 1.6 * 2^-24.
  const F32 r = estimated_rsqrt(s), q = estimated_rsqrt(r);
  const F32 square = r * r, p = square * q;
  const F32 lost = fused_multiply_add(square, q, -p);
  const F32 w = fused_multiply_add(-s, square, broadcast(1.0f));
  // r / 2 by its exponent: integer additions have execution units to spare.
  const F32 half = bit_cast<F32>(bit_cast<I32>(r) - (1 << 23));
  const F32 half_v = fused_multiply_add(-(q * q), half, broadcast(0.5f));
  const F32 correction = fused_multiply_add(w, broadcast(0.75f), half_v);
  return p + fused_multiply_add(p, correction, lost);
#else
  // The estimates give p within 2^-10; with e = 1 - s^3 p^4, s^-3/4 = p (1 - e)^-1/4 =
  // p (1 + e/4 + 5/32 e^2 + ...), whose next term is below 2^-27. Worst error 1.9 * 2^-24.
  const F32 r = estimated_rsqrt(s);
  const F32 p = (r * r) * estimated_rsqrt(r);
  const F32 sp = s * p;
  const F32 e = fused_multiply_add(sp * sp, -(sp * p), broadcast(1.0f));
  return fused_multiply_add(p * e, fused_multiply_add(e, broadcast(0.15625f), broadcast(0.25f)), p);
#endif
}
#endif

template <class A>
inline Vec<A> inverse_three_quarter_power(Vec<A> s) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    StrangeValues<float> strange;  // to the estimates
    strange.see_unless_positive_normal(s);
    if (__builtin_expect(!strange.any(), 1)) return fast_inverse_three_quarter_power(s);
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

// Calls fn(beta) with the fast path of beta as a compile-time constant.
template <class Fn>
auto with_beta(double beta, Fn&& fn) {
  if (beta == 0.75) return fn(std::integral_constant<Beta, Beta::kThreeQuarters>{});
  if (beta == 0.5) return fn(std::integral_constant<Beta, Beta::kHalf>{});
  if (beta == 1.0) return fn(std::integral_constant<Beta, Beta::kOne>{});
  return fn(std::integral_constant<Beta, Beta::kAny>{});
}

// s^-beta without a branch: of any value where it is noted in `strange`, among them those that give
// NaN.
template <Beta kBeta, class A>
inline Vec<A> ordinary_power(Vec<A> s, A beta, StrangeValues<A>& strange) {
#if defined(__AVX2__)
  if constexpr (kBeta == Beta::kThreeQuarters && sizeof(A) == 4) {
    strange.see_unless_positive_normal(s);
    return fast_inverse_three_quarter_power(s);
  }
#endif
  const Vec<A> power = inverse_power<kBeta>(s, beta);
  // A difference from itself is NaN for what is infinite: 0 * inf is the other way to a NaN.
  strange.see_nans(s - s, power - power);
  return power;
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
  bool is_five() const { return before == 2 && after == 2; }

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
