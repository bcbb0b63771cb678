// Chooses and instantiates the LRN row kernel for a layout, a power and a window size.
#include "lrn_rows.h"

#include "lrn_pixels.h"
#include "lrn_planes.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

// Calls fn(beta, size) with both as compile-time constants: the fast path of beta, and 5 or 0 (any
// size).
template <class Fn>
auto specialize(const LrnParams& params, int64_t channels, Fn&& fn) {
  const auto with_size = [&](auto beta) {
    if (LrnWindow<float>(params, channels).size() == 5) {
      return fn(beta, std::integral_constant<int, 5>{});
    }
    return fn(beta, std::integral_constant<int, 0>{});
  };
  if (params.beta == 0.75) return with_size(std::integral_constant<Beta, Beta::kThreeQuarters>{});
  if (params.beta == 0.5) return with_size(std::integral_constant<Beta, Beta::kHalf>{});
  if (params.beta == 1.0) return with_size(std::integral_constant<Beta, Beta::kOne>{});
  return with_size(std::integral_constant<Beta, Beta::kAny>{});
}

}  // namespace

template <class S>
std::unique_ptr<LrnForward<S>> make_lrn_forward(const LrnParams& params, const Map& input) {
  return specialize(params, input.channels, [&](auto beta, auto size) {
    using Base = std::unique_ptr<LrnForward<S>>;
    if (input.channels_last) {
      return Base(new PixelNormalizer<S, beta(), size()>(params, input.channels));
    }
    return Base(new PlaneNormalizer<S, beta(), size()>(params, input.channels));
  });
}

template <class S, class G>
std::unique_ptr<LrnBackward<S, G>> make_lrn_backward(const LrnParams& params, const Map& input) {
  return specialize(params, input.channels, [&](auto beta, auto size) {
    using Base = std::unique_ptr<LrnBackward<S, G>>;
    if (input.channels_last) {
      return Base(new PixelGradient<S, G, beta(), size()>(params, input.channels));
    }
    return Base(new PlaneGradient<S, G, beta(), size()>(params, input.channels));
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
