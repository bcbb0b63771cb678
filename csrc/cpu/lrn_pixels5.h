// Local response normalization of channels_last pixels for windows of five: everything stays in
// registers.
#pragma once
#include "block.h"
#include "lrn_math.h"
#include "lrn_rows.h"

namespace fastalex::cpu::FASTALEX_ISA {

// Elements between a load and its prefetch: a few pixels, far enough for the next level of cache.
inline constexpr int64_t kAhead = 1024;

// Sums of two neighbours on either side and the channel itself, across three adjacent blocks.
template <class S>
inline Block<S> window_sums(const Block<S>& previous, const Block<S>& current,
                            const Block<S>& next) {
  if constexpr (kParts<S> == 1) {
    const auto before = previous.part[0], self = current.part[0], after = next.part[0];
    return {(lanes_before<2>(before, self) + lanes_before<1>(before, self)) +
            (lanes_after<1>(self, after) + lanes_after<2>(self, after)) + self};
  } else {  // windows of an even channel and the odd one after it share four of six channels
    const auto [even, odd] = current.part;
    const auto shared =
        lanes_before<1>(previous.part[1], odd) + (even + odd) + lanes_after<1>(even, next.part[0]);
    return {shared + lanes_before<1>(previous.part[0], even),
            shared + lanes_after<1>(odd, next.part[1])};
  }
}

template <class S>
inline Block<S> squared(const Block<S>& block) {
  return by_part<S>([&](int p) { return block.part[p] * block.part[p]; });
}

// y = lrn(x). Reads C and writes C elements a pixel; each input is loaded once.
template <class S, Beta kBeta>
class PixelNormalizer5 final : public LrnForward<S> {
  using A = compute_t<S>;

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
    Block<S> value = load_block_up_to(x, channels);
    Block<S> before{}, square = squared(value);
    for (int64_t c = 0; c < channels; c += kBlock<S>) {
      const int64_t left = channels - c, ahead = left - kBlock<S>;
      const Block<S> next = ahead > 0 ? load_block_up_to(x + c + kBlock<S>, ahead) : Block<S>{};
      const Block<S> after = squared(next), sums = window_sums(before, square, after);
      const Block<S> result = by_part<S>([&](int p) {
        return value.part[p] * inverse_power<kBeta, S>(window.base(sums.part[p]), window.beta);
      });
      store_block_up_to(y + c, result, left);
      __builtin_prefetch(x + c + kAhead);
      before = square;
      square = after;
      value = next;
    }
  }

  LrnWindow<A> window_;
};

// gx as in PixelGradient. The products that a window sums need squares one block ahead, and the
// window itself needs products one block ahead: the loop carries two blocks of each.
template <class S, class G, Beta kBeta>
class PixelGradient5 final : public LrnBackward<S, G> {
  using A = compute_t<S>;

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
  // One block of channels: its inputs, g s^-beta, and g x s^(-beta-1), the product that windows
  // sum.
  struct Terms {
    Block<S> x{}, direct{}, product{};
  };

  static Terms terms(const LrnWindow<A>& window, const G* g, const Block<S>& x,
                     const Block<S>& before, const Block<S>& square, const Block<S>& after,
                     int64_t left) {
    const Block<S> grad = load_split_up_to<S>(g, left), sums = window_sums(before, square, after);
    Terms result{.x = x};
    for (int p = 0; p < kParts<S>; ++p) {
      const Vec<A> s = window.base(sums.part[p]);
      const auto [direct, product] =
          gradient_terms<kBeta, S>(grad.part[p], x.part[p], s, window.beta);
      result.direct.part[p] = direct;
      // Lanes past the group must add nothing, even where k = 0 makes 1/s infinite there.
      const int64_t lanes = (left - p + kParts<S> - 1) / kParts<S>;
      result.product.part[p] = left < kBlock<S> ? keep_first<A>(product, lanes) : product;
    }
    return result;
  }

  static Block<S> load_at(const LrnWindow<A>& window, const S* x, int64_t c) {
    const int64_t left = window.group_channels - c;
    return left > 0 ? load_block_up_to(x + c, left) : Block<S>{};
  }

  static void differentiate(const LrnWindow<A>& window, const G* g, const S* x, S* gx) {
    const int64_t channels = window.group_channels;
    const Vec<A> coefficient = broadcast(A(-2) * window.scale * window.beta);
    Block<S> x_next = load_at(window, x, kBlock<S>);
    const Block<S> x_first = load_at(window, x, 0);
    Block<S> square = squared(x_first), square_next = squared(x_next);
    Terms before, current = terms(window, g, x_first, Block<S>{}, square, square_next, channels);
    for (int64_t c = 0; c < channels; c += kBlock<S>) {
      Terms next;
      if (channels - c > kBlock<S>) {
        const Block<S> x_ahead = load_at(window, x, c + 2 * kBlock<S>);
        const Block<S> square_ahead = squared(x_ahead);
        next = terms(window, g + c + kBlock<S>, x_next, square, square_next, square_ahead,
                     channels - c - kBlock<S>);
        square = square_next;
        square_next = square_ahead;
        x_next = x_ahead;
      }
      const Block<S> shared = window_sums(before.product, current.product, next.product);
      const Block<S> gradient = by_part<S>([&](int p) {
        return fused_multiply_add(coefficient * current.x.part[p], shared.part[p],
                                  current.direct.part[p]);
      });
      store_block_up_to(gx + c, gradient, channels - c);
      __builtin_prefetch(x + c + kAhead);
      __builtin_prefetch(g + c + kAhead);
      before = current;
      current = next;
    }
  }

  LrnWindow<A> window_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
