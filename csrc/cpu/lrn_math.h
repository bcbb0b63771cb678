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

// What the estimates below give of a normal s.
struct Estimated {
  F32 power, inverse;  // s^-3/4 and 1/s
};

// Without a root or a division, as exactly as a result of type S shows.
template <class S>
inline Estimated estimated_powers(F32 s) {
#if defined(__AVX512F__)
  // From estimates r of s^-1/2 and q of r^-1/2 within 2^-14: s^-3/4 = r^2 q (1 - w)^-3/4 (1 -
  // v)^-1/2 and 1/s = r^2 / (1 - w), where w = 1 - s r^2 and v = 1 - q^2 r, whose terms of second
  // order are below 2^-25. Worst error 2.2 * 2^-24; of the estimates alone 2.5 * 2^-14, a
  // thirteenth of bfloat16's rounding.
  const F32 r = estimated_rsqrt(s), q = estimated_rsqrt(r);
  const F32 square = r * r, p = square * q;
  if constexpr (std::is_same_v<S, bfloat16>) return {p, square};
  const F32 w = fused_multiply_add(-s, square, broadcast(1.0f));
  // r / 2 by its exponent: integer additions have execution units to spare.
  const F32 half = bit_cast<F32>(bit_cast<I32>(r) - (1 << 23));
  const F32 half_v = fused_multiply_add(-(q * q), half, broadcast(0.5f));
  const F32 correction = fused_multiply_add(w, broadcast(0.75f), half_v);
  return {fused_multiply_add(p, correction, p), fused_multiply_add(square, w, square)};
#else
  // The estimates give p within 2^-10; with e = 1 - s^3 p^4, s^-3/4 = p (1 - e)^-1/4 =
  // p (1 + e/4 + 5/32 e^2 + ...), whose next term is below 2^-27. Worst error 1.9 * 2^-24.
  const F32 r = estimated_rsqrt(s);
  const F32 p = (r * r) * estimated_rsqrt(r);
  const F32 sp = s * p;
  const F32 e = fused_multiply_add(sp * sp, -(sp * p), broadcast(1.0f));
  const F32 series = fused_multiply_add(e, broadcast(0.15625f), broadcast(0.25f));
  return {fused_multiply_add(p * e, series, p), 1.0f / s};
#endif
}
#endif

// Whether s^-beta is estimated, wherever s is a positive normal number.
#if defined(__AVX2__)
template <Beta kBeta, class A>
inline constexpr bool kEstimated = kBeta == Beta::kThreeQuarters && sizeof(A) == 4;
#else
template <Beta kBeta, class A>
inline constexpr bool kEstimated = false;
#endif

// s^-beta of any s
template <Beta kBeta, class A>
inline Vec<A> exact_power(Vec<A> s, A beta) {
  if constexpr (kBeta == Beta::kThreeQuarters) {
    const Vec<A> root = square_root<A>(s);
    return A(1) / (root * square_root<A>(root));
  }
  if constexpr (kBeta == Beta::kHalf) return A(1) / square_root<A>(s);
  if constexpr (kBeta == Beta::kOne) return A(1) / s;
  for (int lane = 0; lane < kLanes<A>; ++lane) s[lane] = std::pow(s[lane], -beta);
  return s;
}

// s^-beta of any s, for a result of type S
template <Beta kBeta, class S, class A = compute_t<S>>
inline Vec<A> inverse_power(Vec<A> s, A beta) {
  if constexpr (kEstimated<kBeta, A>) {
    StrangeValues<A> strange;
    strange.see_unless_positive_normal(s);
    if (__builtin_expect(!strange.any(), 1)) return estimated_powers<S>(s).power;
  }
  return exact_power<kBeta>(s, beta);
}

// g s^-beta, and g x s^(-beta - 1), the product that windows of a gradient sum.
template <class A>
struct GradientTerms {
  Vec<A> direct, product;
};

template <Beta kBeta, class S, class A = compute_t<S>>
inline GradientTerms<A> gradient_terms(Vec<A> g, Vec<A> x, Vec<A> s, A beta) {
  if constexpr (kEstimated<kBeta, A>) {
    StrangeValues<A> strange;
    strange.see_unless_positive_normal(s);
    if (__builtin_expect(!strange.any(), 1)) {
      const auto [power, inverse] = estimated_powers<S>(s);
      return {g * power, (g * power) * (x * inverse)};
    }
  }
  const Vec<A> direct = g * exact_power<kBeta>(s, beta);
  return {direct, direct * x / s};
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
template <Beta kBeta, class S, class A = compute_t<S>>
inline Vec<A> ordinary_power(Vec<A> s, A beta, StrangeValues<A>& strange) {
  if constexpr (kEstimated<kBeta, A>) {
    strange.see_unless_positive_normal(s);
    return estimated_powers<S>(s).power;
  } else {
    const Vec<A> power = exact_power<kBeta>(s, beta);
    // A difference from itself is NaN for what is infinite: 0 * inf is the other way to a NaN.
    strange.see_nans(s - s, power - power);
    return power;
  }
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
