// Chooses and instantiates the LRN row kernel for a layout, a power and a window size.
#include "lrn_rows.h"

#include "lrn_pixels.h"
#include "lrn_pixels5.h"
#include "lrn_planes.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

// Calls fn(beta) with the fast path of beta as a compile-time constant.
template <class Fn>
auto with_beta(double beta, Fn&& fn) {
  if (beta == 0.75) return fn(std::integral_constant<Beta, Beta::kThreeQuarters>{});
  if (beta == 0.5) return fn(std::integral_constant<Beta, Beta::kHalf>{});
  if (beta == 1.0) return fn(std::integral_constant<Beta, Beta::kOne>{});
  return fn(std::integral_constant<Beta, Beta::kAny>{});
}

bool window_of_five(const LrnParams& params, int64_t channels) {
  const LrnWindow<float> window(params, channels);
  return window.before == 2 && window.after == 2;
}

}  // namespace

template <class S>
std::unique_ptr<LrnForward<S>> make_lrn_forward(const LrnParams& params, const Map& input) {
  const int64_t channels = input.channels;
  const bool five = window_of_five(params, channels);
  return with_beta(params.beta, [&](auto beta) -> std::unique_ptr<LrnForward<S>> {
    if (!input.channels_last) {
      if (five) return std::make_unique<PlaneNormalizer<S, beta(), 5>>(params, channels);
      return std::make_unique<PlaneNormalizer<S, beta(), 0>>(params, channels);
    }
    if (five) return std::make_unique<PixelNormalizer5<S, beta()>>(params, channels);
    return std::make_unique<PixelNormalizer<S, beta()>>(params, channels);
  });
}

template <class S, class G>
std::unique_ptr<LrnBackward<S, G>> make_lrn_backward(const LrnParams& params, const Map& input) {
  const int64_t channels = input.channels;
  const bool five = window_of_five(params, channels);
  return with_beta(params.beta, [&](auto beta) -> std::unique_ptr<LrnBackward<S, G>> {
    if (!input.channels_last) {
      if (five) return std::make_unique<PlaneGradient<S, G, beta(), 5>>(params, channels);
      return std::make_unique<PlaneGradient<S, G, beta(), 0>>(params, channels);
    }
    if (five) return std::make_unique<PixelGradient5<S, G, beta()>>(params, channels);
    return std::make_unique<PixelGradient<S, G, beta()>>(params, channels);
  });
}

template std::unique_ptr<LrnForward<float>> make_lrn_forward(const LrnParams&, const Map&);
template std::unique_ptr<LrnForward<double>> make_lrn_forward(const LrnParams&, const Map&);
template std::unique_ptr<LrnForward<bfloat16>> make_lrn_forward(const LrnParams&, const Map&);
template std::unique_ptr<LrnForward<float16>> make_lrn_forward(const LrnParams&, const Map&);

template std::unique_ptr<LrnBackward<float, float>> make_lrn_backward(const LrnParams&, const Map&);
template std::unique_ptr<LrnBackward<double, double>> make_lrn_backward(const LrnParams&,
                                                                        const Map&);
template std::unique_ptr<LrnBackward<bfloat16, bfloat16>> make_lrn_backward(const LrnParams&,
                                                                            const Map&);
template std::unique_ptr<LrnBackward<float16, float16>> make_lrn_backward(const LrnParams&,
                                                                          const Map&);
template std::unique_ptr<LrnBackward<bfloat16, float>> make_lrn_backward(const LrnParams&,
                                                                         const Map&);
template std::unique_ptr<LrnBackward<float16, float>> make_lrn_backward(const LrnParams&,
                                                                        const Map&);

}  // namespace fastalex::cpu::FASTALEX_ISA
