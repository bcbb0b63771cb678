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

 public:
  NormalizedPool5(const LrnParams& lrn, const Map& in, const Map& out)
      : window_(lrn, in.channels),
        x_stride_(in.pixel_stride),
        y_stride_(out.pixel_stride),
        out_width_(out.width),
        group_pitch_((window_.group_channels + kBlock<S> - 1) / kBlock<S> * kBlock<S>),
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
      for (int64_t c = 0; c < window.group_channels; c += kBlock<S>) {
        const Block<S> v = pixel.normalized(window, c, strange);
        keep(last_pixel_.data() + g * group_pitch_ + c, v);
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
  // Blocks that stay in the compute type, one part after the other.
  static void keep(A* p, const Block<S>& block) {
    for (int part = 0; part < kParts<S>; ++part) store(p + part * kLanes<A>, block.part[part]);
  }
  static Block<S> kept(const A* p) {
    return by_part<S>([&](int part) { return load(p + part * kLanes<A>); });
  }
  static Block<S> larger_of(const Block<S>& a, const Block<S>& b) {
    return by_part<S>([&](int part) { return larger<A>(a.part[part], b.part[part]); });
  }

  // A group of channels of one pixel, normalised block by block in ascending order.
  class Pixel {
   public:
    Pixel(const S* x, int64_t channels)
        : x_(x),
          channels_(channels),
          value_(load_block_up_to(x, channels)),
          square_(squared(value_)) {}

    Block<S> normalized(const LrnWindow<A>& window, int64_t c, StrangeValues<A>& strange) {
      const int64_t ahead = channels_ - c - kBlock<S>;
      const Block<S> next = ahead > 0 ? load_block_up_to(x_ + c + kBlock<S>, ahead) : Block<S>{};
      const Block<S> after = squared(next), sums = window_sums(before_, square_, after);
      const Block<S> result = by_part<S>([&](int p) {
        const Vec<A> s = window.base(sums.part[p]);
        return value_.part[p] * ordinary_power<kBeta, S>(s, window.beta, strange);
      });
      __builtin_prefetch(x_ + c + kAhead);
      before_ = square_;
      square_ = after;
      value_ = next;
      return result;
    }

   private:
    const S* x_;
    int64_t channels_;
    Block<S> value_, before_{}, square_;
  };

  // The windows' second and third pixel, beside the first in `last`; in their place, last keeps the
  // third.
  template <RowOfWindow kRow>
  void pool_two(const LrnWindow<A>& window, const S* x, A* last, A* best, S* y,
                StrangeValues<A>& strange) {
    const int64_t channels = window.group_channels;
    Pixel second(x, channels), third(x + x_stride_, channels);
    for (int64_t c = 0; c < channels; c += kBlock<S>) {
      const Block<S> v = second.normalized(window, c, strange);
      const Block<S> w = third.normalized(window, c, strange);
      const Block<S> row = larger_of(w, larger_of(v, kept(last + c)));
      keep(last + c, w);
      if constexpr (kRow == RowOfWindow::kFirst) {
        keep(best + c, row);
      } else {
        const Block<S> joined = larger_of(row, kept(best + c));
        if constexpr (kRow == RowOfWindow::kSecond) {
          keep(best + c, joined);
        } else {
          store_block_up_to(y + c, joined, channels - c);
          keep(best + c, row);
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
