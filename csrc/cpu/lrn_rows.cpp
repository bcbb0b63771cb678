// Chooses and instantiates the LRN row kernel for a layout, a power and a window size.
#include "lrn_rows.h"

#include "lrn_pixels.h"
#include "lrn_pixels5.h"
#include "lrn_planes.h"
#include "lrn_planes5.h"

namespace fastalex::cpu::FASTALEX_ISA {
template <class S>
std::unique_ptr<LrnForward<S>> make_lrn_forward(const LrnParams& params, const Map& input) {
  const int64_t channels = input.channels;
  const bool five = LrnWindow<float>(params, channels).is_five();
  return with_beta(params.beta, [&](auto beta) -> std::unique_ptr<LrnForward<S>> {
    if (!input.channels_last) {
      if (five) return std::make_unique<PlaneNormalizer5<S, beta()>>(params, channels);
      return std::make_unique<PlaneNormalizer<S, beta()>>(params, channels);
    }
    if (five) return std::make_unique<PixelNormalizer5<S, beta()>>(params, channels);
    return std::make_unique<PixelNormalizer<S, beta()>>(params, channels);
  });
}

template <class S, class G>
std::unique_ptr<LrnBackward<S, G>> make_lrn_backward(const LrnParams& params, const Map& input) {
  const int64_t channels = input.channels;
  const bool five = LrnWindow<float>(params, channels).is_five();
  return with_beta(params.beta, [&](auto beta) -> std::unique_ptr<LrnBackward<S, G>> {
    if (!input.channels_last) {
      if (five) return std::make_unique<PlaneGradient5<S, G, beta()>>(params, channels);
      return std::make_unique<PlaneGradient<S, G, beta()>>(params, channels);
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
