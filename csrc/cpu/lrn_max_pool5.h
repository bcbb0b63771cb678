// LRN over windows of five channels and 3x3/s2 max-pooling of channels_last maps, without offsets:
// a row is pooled while it is normalised, in registers, and no normalised element is ever stored.
#pragma once
#include "lrn_pixels5.h"
#include "scratch.h"

namespace fastalex::cpu::FASTALEX_ISA {

// What a row of the input does to the maxima of the windows it lies in: the first row of a window
// starts them, the second joins, and the last completes them and starts those of the windows below.
enum class RowOfWindow { kFirst, kSecond, kLast };

template <class S, Beta kBeta>
class NormalizedPool5 {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  NormalizedPool5(const LrnParams& lrn, const Map& in, const Map& out)
      : window_(lrn, in.channels),
        x_stride_(in.pixel_stride),
        y_stride_(out.pixel_stride),
        out_width_(out.width),
        group_pitch_((window_.group_channels + kWidth - 1) / kWidth * kWidth),
        pitch_(group_pitch_ * window_.groups),
        last_pixel_(pitch_),
        best_(pitch_ * out.width) {}

  // One row of inputs; y: the row of outputs that RowOfWindow::kLast completes. False where a NaN
  // came up, which a plain maximum loses: the results are then not to be used.
  template <RowOfWindow kRow>
  bool run(const S* x, S* y) {
    const LrnWindow<A> window = window_;  // a copy that no store can alias
    StrangeValues<A> strange;
    for (int64_t g = 0; g < window.groups; ++g) {
      Pixel pixel(x + g * window.group_channels, window.group_channels);
      for (int64_t c = 0; c < window.group_channels; c += kWidth) {
        const Vec<A> v = pixel.normalized(window, c, strange);
        store(last_pixel_.data() + g * group_pitch_ + c, v);
      }
    }
    for (int64_t ow = 0; ow < out_width_; ++ow) {
      for (int64_t g = 0; g < window.groups; ++g) {
        const int64_t channel = g * window.group_channels;
        pool_two<kRow>(
            window, x + (2 * ow + 1) * x_stride_ + channel, last_pixel_.data() + g * group_pitch_,
            best_.data() + ow * pitch_ + g * group_pitch_, y + ow * y_stride_ + channel, strange);
      }
    }
    return !strange.any();
  }

 private:
  // A group of channels of one pixel, normalised vector by vector in ascending order.
  class Pixel {
   public:
    Pixel(const S* x, int64_t channels)
        : x_(x), channels_(channels), value_(load_up_to(x, channels)), square_(value_ * value_) {}

    Vec<A> normalized(const LrnWindow<A>& window, int64_t c, StrangeValues<A>& strange) {
      const int64_t ahead = channels_ - c - kWidth;
      const Vec<A> next = ahead > 0 ? load_up_to(x_ + c + kWidth, ahead) : Vec<A>{};
      const Vec<A> after = next * next;
      const Vec<A> s = window.base(sum_of_five(before_, square_, after));
      const Vec<A> result = value_ * ordinary_power<kBeta>(s, window.beta, strange);
      __builtin_prefetch(x_ + c + kAhead);
      before_ = square_;
      square_ = after;
      value_ = next;
      return result;
    }

   private:
    const S* x_;
    int64_t channels_;
    Vec<A> value_, before_{}, square_;
  };

  // The windows' second and third pixel, beside the first in `last`; in their place, last keeps the
  // third.
  template <RowOfWindow kRow>
  void pool_two(const LrnWindow<A>& window, const S* x, A* last, A* best, S* y,
                StrangeValues<A>& strange) {
    const int64_t channels = window.group_channels;
    Pixel second(x, channels), third(x + x_stride_, channels);
    for (int64_t c = 0; c < channels; c += kWidth) {
      const Vec<A> v = second.normalized(window, c, strange);
      const Vec<A> w = third.normalized(window, c, strange);
      const Vec<A> row = larger<A>(w, larger<A>(v, load(last + c)));
      store(last + c, w);
      if constexpr (kRow == RowOfWindow::kFirst) {
        store(best + c, row);
      } else {
        const Vec<A> joined = larger<A>(row, load(best + c));
        if constexpr (kRow == RowOfWindow::kSecond) {
          store(best + c, joined);
        } else {
          store_up_to(y + c, joined, channels - c);
          store(best + c, row);
        }
      }
    }
  }

  LrnWindow<A> window_;
  int64_t x_stride_, y_stride_, out_width_;
  int64_t group_pitch_, pitch_;
  Scratch<A> last_pixel_, best_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
