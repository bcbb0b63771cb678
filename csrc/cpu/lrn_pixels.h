// Local response normalization of channels_last pixels, any window: a pixel's channels stand in
// padded scratch.
#pragma once
#include "lrn_math.h"
#include "lrn_rows.h"
#include "scratch.h"

namespace fastalex::cpu::FASTALEX_ISA {

// Per-pixel values kept so that a window never needs a bounds check: every group of channels stands
// between zeros.
template <class A>
class PaddedChannels {
 public:
  PaddedChannels(const LrnWindow<A>& window, int64_t pixels, int64_t before, int64_t after)
      : before_(before),
        group_pitch_((before + window.group_channels + after + 2 * kLanes<A> - 1) / kLanes<A> *
                     kLanes<A>),
        pixel_pitch_(group_pitch_ * window.groups),
        values_(pixel_pitch_ * pixels + kLanes<A> + window.size()) {
    std::memset(values_.data(), 0, (pixel_pitch_ * pixels + kLanes<A> + window.size()) * sizeof(A));
  }

  // Where the first channel of `group` goes; a full vector may be stored from any channel of the
  // group.
  A* channels(int64_t pixel, int64_t group) { return window(pixel, group) + before_; }
  // Where the window of the first channel of `group` begins.
  A* window(int64_t pixel, int64_t group) {
    return values_.data() + pixel * pixel_pitch_ + group * group_pitch_;
  }

 private:
  int64_t before_, group_pitch_, pixel_pitch_;
  Scratch<A> values_;
};

template <class S, class A>
inline void square_channels(const S* x, const LrnWindow<A>& window, PaddedChannels<A>& squares,
                            int64_t pixel) {
  for (int64_t group = 0; group < window.groups; ++group, x += window.group_channels) {
    A* out = squares.channels(pixel, group);
    for (int64_t c = 0; c < window.group_channels; c += kLanes<A>) {
      const Vec<A> v = load_up_to(x + c, window.group_channels - c);
      store(out + c, v * v);
    }
  }
}

// Pixels handled together, so that shifted loads come long after the stores they read.
inline constexpr int64_t kPixelRun = 8;

// y = lrn(x) for `pixels` pixels of C = groups * group_channels adjacent channels.
// Reads C and writes C elements a pixel; (2 * size + 12) * C FLOPs with beta = 0.75.
template <class S, Beta kBeta>
class PixelNormalizer final : public LrnForward<S> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PixelNormalizer(const LrnParams& params, int64_t channels)
      : window_(params, channels), squares_(window_, kPixelRun, window_.before, window_.after) {}

  void run(const S* x, int64_t x_stride, S* y, int64_t y_stride, int64_t pixels) override {
    for (int64_t first = 0; first < pixels; first += kPixelRun) {
      const int64_t count = std::min(kPixelRun, pixels - first);
      for (int64_t p = 0; p < count; ++p) {
        square_channels(x + (first + p) * x_stride, window_, squares_, p);
      }
      for (int64_t p = 0; p < count; ++p) {
        scale(x + (first + p) * x_stride, y + (first + p) * y_stride, p);
      }
    }
  }

 private:
  void scale(const S* x, S* y, int64_t p) {
    for (int64_t g = 0; g < window_.groups; ++g) {
      const A* in = squares_.window(p, g);
      for (int64_t c = 0; c < window_.group_channels; c += kWidth) {
        const int64_t left = window_.group_channels - c;
        const Vec<A> sum = window_sum(in + c, window_.size());
        const Vec<A> s = window_.base(sum);
        store_up_to(y + c, load_up_to(x + c, left) * inverse_power<kBeta, S>(s, window_.beta),
                    left);
      }
      x += window_.group_channels;
      y += window_.group_channels;
    }
  }

  LrnWindow<A> window_;
  PaddedChannels<A> squares_;
};

// gx = g s^-beta - 2 scale beta x * (sum of g x s^(-beta-1) over the channels whose window holds
// this one). G is the type g is stored in: S, or the compute type where the caller has just made
// it.
template <class S, class G, Beta kBeta>
class PixelGradient final : public LrnBackward<S, G> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PixelGradient(const LrnParams& params, int64_t channels)
      : window_(params, channels),
        squares_(window_, kPixelRun, window_.before, window_.after),
        products_(window_, kPixelRun, window_.after, window_.before),
        direct_(window_, kPixelRun, 0, 0) {}

  void run(const G* g, int64_t g_stride, const S* x, int64_t x_stride, S* gx, int64_t gx_stride,
           int64_t pixels) override {
    for (int64_t first = 0; first < pixels; first += kPixelRun) {
      const int64_t count = std::min(kPixelRun, pixels - first);
      for (int64_t p = 0; p < count; ++p) {
        square_channels(x + (first + p) * x_stride, window_, squares_, p);
      }
      for (int64_t p = 0; p < count; ++p) {
        multiply(g + (first + p) * g_stride, x + (first + p) * x_stride, p);
      }
      for (int64_t p = 0; p < count; ++p) {
        gather(x + (first + p) * x_stride, gx + (first + p) * gx_stride, p);
      }
    }
  }

 private:
  void multiply(const G* g, const S* x, int64_t p) {
    for (int64_t group = 0; group < window_.groups; ++group) {
      const A* in = squares_.window(p, group);
      A* product = products_.channels(p, group);
      A* direct = direct_.channels(p, group);
      for (int64_t c = 0; c < window_.group_channels; c += kWidth) {
        const int64_t left = window_.group_channels - c;
        const Vec<A> sum = window_sum(in + c, window_.size());
        const Vec<A> s = window_.base(sum);
        const auto terms = gradient_terms<kBeta, S>(load_up_to(g + c, left),
                                                    load_up_to(x + c, left), s, window_.beta);
        store(direct + c, terms.direct);
        // Lanes past the group must stay zero even where k = 0 makes 1/s infinite there.
        store_up_to(product + c, terms.product, left);
      }
      g += window_.group_channels;
      x += window_.group_channels;
    }
  }

  void gather(const S* x, S* gx, int64_t p) {
    const Vec<A> coefficient = broadcast(A(-2) * window_.scale * window_.beta);
    for (int64_t group = 0; group < window_.groups; ++group) {
      const A* product = products_.window(p, group);
      const A* direct = direct_.channels(p, group);
      for (int64_t c = 0; c < window_.group_channels; c += kWidth) {
        const int64_t left = window_.group_channels - c;
        const Vec<A> sum = window_sum(product + c, window_.size());
        const Vec<A> v = coefficient * load_up_to(x + c, left);
        store_up_to(gx + c, fused_multiply_add(v, sum, load(direct + c)), left);
      }
      x += window_.group_channels;
      gx += window_.group_channels;
    }
  }

  LrnWindow<A> window_;
  PaddedChannels<A> squares_;
  PaddedChannels<A> products_;
  PaddedChannels<A> direct_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
