// Local response normalization of channels_last pixels for windows of five: everything stays in
// registers.
#pragma once
#include "lrn_math.h"
#include "lrn_rows.h"

namespace fastalex::cpu::FASTALEX_ISA {

// Elements between a load and its prefetch: a few pixels, far enough for the next level of cache.
inline constexpr int64_t kAhead = 1024;

// Sums of two neighbours on either side and the lane itself, across three adjacent vectors.
template <class V>
inline V sum_of_five(V previous, V current, V next) {
  return (lanes_before<2>(previous, current) + lanes_before<1>(previous, current)) +
         (lanes_after<1>(current, next) + lanes_after<2>(current, next)) + current;
}

// y = lrn(x). Reads C and writes C elements a pixel; each input is loaded once.
template <class S, Beta kBeta>
class PixelNormalizer5 final : public LrnForward<S> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PixelNormalizer5(const LrnParams& params, int64_t channels) : window_(params, channels) {}

  void run(const S* x, int64_t x_stride, S* y, int64_t y_stride, int64_t pixels) override {
    const LrnWindow<A> window = window_;  // a copy that no store through y can alias
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t group = 0; group < window.groups; ++group) {
        const int64_t first = group * window.group_channels;
        normalize(window, x + p * x_stride + first, y + p * y_stride + first);
      }
    }
  }

 private:
  static void normalize(const LrnWindow<A>& window, const S* x, S* y) {
    const int64_t channels = window.group_channels;
    Vec<A> value = load_up_to(x, channels);
    Vec<A> before{}, square = value * value;
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t left = channels - c;
      const Vec<A> next = left > kWidth ? load_up_to(x + c + kWidth, left - kWidth) : Vec<A>{};
      const Vec<A> after = next * next;
      const Vec<A> s = window.base(sum_of_five(before, square, after));
      store_up_to(y + c, value * inverse_power<kBeta>(s, window.beta), left);
      __builtin_prefetch(x + c + kAhead);
      before = square;
      square = after;
      value = next;
    }
  }

  LrnWindow<A> window_;
};

// gx as in PixelGradient. The products that a window sums need squares one vector ahead, and the
// window itself needs products one vector ahead: the loop carries two vectors of each.
template <class S, class G, Beta kBeta>
class PixelGradient5 final : public LrnBackward<S, G> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PixelGradient5(const LrnParams& params, int64_t channels) : window_(params, channels) {}

  void run(const G* g, int64_t g_stride, const S* x, int64_t x_stride, S* gx, int64_t gx_stride,
           int64_t pixels) override {
    const LrnWindow<A> window = window_;  // a copy that no store through gx can alias
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t group = 0; group < window.groups; ++group) {
        const int64_t first = group * window.group_channels;
        differentiate(window, g + p * g_stride + first, x + p * x_stride + first,
                      gx + p * gx_stride + first);
      }
    }
  }

 private:
  // One vector of channels: its inputs, g s^-beta, and g x s^(-beta-1), the product that windows
  // sum.
  struct Terms {
    Vec<A> x{}, direct{}, product{};
  };

  static Terms terms(const LrnWindow<A>& window, const G* g, Vec<A> x, Vec<A> before, Vec<A> square,
                     Vec<A> after, int64_t left) {
    const Vec<A> s = window.base(sum_of_five(before, square, after));
    const Vec<A> direct = load_up_to(g, left) * inverse_power<kBeta>(s, window.beta);
    const Vec<A> product = direct * x / s;
    // Lanes past the group must add nothing, even where k = 0 makes 1/s infinite there.
    return {x, direct, left < kWidth ? keep_first<A>(product, left) : product};
  }

  static Vec<A> load_at(const LrnWindow<A>& window, const S* x, int64_t c) {
    const int64_t left = window.group_channels - c;
    return left > 0 ? load_up_to(x + c, left) : Vec<A>{};
  }

  static void differentiate(const LrnWindow<A>& window, const G* g, const S* x, S* gx) {
    const int64_t channels = window.group_channels;
    const Vec<A> coefficient = broadcast(A(-2) * window.scale * window.beta);
    Vec<A> x_next = load_at(window, x, kWidth);
    const Vec<A> x_first = load_at(window, x, 0);
    Vec<A> square = x_first * x_first, square_next = x_next * x_next;
    Terms before, current = terms(window, g, x_first, Vec<A>{}, square, square_next, channels);
    for (int64_t c = 0; c < channels; c += kWidth) {
      Terms next;
      if (channels - c > kWidth) {
        const Vec<A> x_ahead = load_at(window, x, c + 2 * kWidth);
        const Vec<A> square_ahead = x_ahead * x_ahead;
        next = terms(window, g + c + kWidth, x_next, square, square_next, square_ahead,
                     channels - c - kWidth);
        square = square_next;
        square_next = square_ahead;
        x_next = x_ahead;
      }
      const Vec<A> shared = sum_of_five(before.product, current.product, next.product);
      const Vec<A> gradient = fused_multiply_add(coefficient * current.x, shared, current.direct);
      store_up_to(gx + c, gradient, channels - c);
      __builtin_prefetch(x + c + kAhead);
      __builtin_prefetch(g + c + kAhead);
      before = current;
      current = next;
    }
  }

  LrnWindow<A> window_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
