// Max-pooling of one row of outputs, forward and backward, of channels_last pixels.
#pragma once
#include "pool_window.h"

namespace fastalex::cpu::FASTALEX_ISA {

// One row of outputs: y[ow][c] over the valid rows of the window.
template <class S, class Offset, bool kTrack>
class PixelPool {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PixelPool(const PoolParams& params, int64_t in_width, const Map& out)
      : params_(params),
        channels_(out.channels),
        out_width_(out.width),
        columns_(out.width),
        sources_(params.taps()),
        taps_(params.taps()) {
    for (int64_t ow = 0; ow < out.width; ++ow) {
      columns_[ow] = TapRange(ow * params.stride_w - params.padding_w, params.kernel_w,
                              params.dilation_w, in_width);
    }
  }

  // rows[kh - kh_range.first]: the input row under tap row kh.
  void run(const S* const* rows, TapRange kh_range, int64_t in_stride, S* y, int64_t y_stride,
           Offset* offsets) {
    for (int64_t ow = 0; ow < out_width_; ++ow) {
      const int64_t start = ow * params_.stride_w - params_.padding_w;
      const TapRange kw_range = columns_[ow];
      int64_t count = 0;
      for (int64_t kh = kh_range.first; kh < kh_range.last; ++kh) {
        for (int64_t kw = kw_range.first; kw < kw_range.last; ++kw, ++count) {
          const int64_t iw = start + kw * params_.dilation_w;
          sources_[count] = rows[kh - kh_range.first] + iw * in_stride;
          taps_[count] = static_cast<int>(kh * params_.kernel_w + kw);
        }
      }
      Offset* offsets_out = kTrack ? offsets + ow * channels_ : nullptr;
      if (count == 9) {
        reduce<9>(count, y + ow * y_stride, offsets_out);
      } else if (count > 0) {
        reduce<0>(count, y + ow * y_stride, offsets_out);
      } else {
        fill_empty_windows(y + ow * y_stride, offsets_out, channels_);
      }
    }
  }

 private:
  template <int kCount>
  void reduce(int64_t count, S* y, Offset* offsets) {
    if constexpr (kCount != 0) count = kCount;
    const S* const* sources = sources_.data();
    const int* taps = taps_.data();
    for (int64_t c = 0; c < channels_; c += kBlock<S>) {
      const int64_t left = channels_ - c;
      const auto tap = [&](int64_t t) { return load_block_up_to(sources[t] + c, left); };
      if constexpr (kTrack) {
        Winner<A, true> winners[kParts<S>];
        const auto first = tap(0);
        for (int p = 0; p < kParts<S>; ++p) winners[p].start(first.part[p], taps[0]);
        for (int64_t t = 1; t < count; ++t) {
          const auto v = tap(t);
          for (int p = 0; p < kParts<S>; ++p) winners[p].challenge(v.part[p], taps[t]);
        }
        store_block_up_to(y + c, by_part<S>([&](int p) { return winners[p].value; }), left);
        store_block_lanes<S>(offsets + c, [&](int p) { return winners[p].tap; }, left);
      } else {
        store_block_up_to(y + c, largest<S>(count, tap), left);
      }
    }
  }

  PoolParams params_;
  int64_t channels_, out_width_;
  Scratch<TapRange> columns_;
  Scratch<const S*> sources_;
  Scratch<int> taps_;
};

// For each position along one dimension, the windows that hold it, ascending, and the tap at which
// they do: computed once, because the divisions would cost a pixel more than its arithmetic.
class WindowTable {
 public:
  struct Entry {
    int64_t window;
    int64_t tap;
  };

  WindowTable(int64_t positions, int64_t windows, int64_t kernel, int64_t stride, int64_t padding,
              int64_t dilation)
      : first_(positions + 1), entries_(windows * kernel) {
    int64_t count = 0;
    for (int64_t i = 0; i < positions; ++i) {
      first_[i] = count;
      const int64_t reach = i + padding - (kernel - 1) * dilation;
      const int64_t lowest = reach <= 0 ? 0 : (reach + stride - 1) / stride;
      const int64_t highest = std::min(windows - 1, (i + padding) / stride);
      for (int64_t window = lowest; window <= highest; ++window) {
        const int64_t distance = i + padding - window * stride;
        if (distance % dilation == 0) entries_[count++] = {window, distance / dilation};
      }
    }
    first_[positions] = count;
  }

  const Entry* begin(int64_t position) const { return entries_.data() + first_[position]; }
  const Entry* end(int64_t position) const { return entries_.data() + first_[position + 1]; }

 private:
  Scratch<int64_t> first_;
  Scratch<Entry> entries_;
};

// One row of the input's gradient, gathered: each pixel sums the outputs whose winner it is, in
// their order.
template <class S, class Offset, class Out>
class PixelUnpool {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PixelUnpool(const PoolParams& params, const Map& grad, int64_t in_height, int64_t in_width)
      : grad_(grad),
        in_width_(in_width),
        kernel_w_(params.kernel_w),
        rows_(in_height, grad.height, params.kernel_h, params.stride_h, params.padding_h,
              params.dilation_h),
        columns_(in_width, grad.width, params.kernel_w, params.stride_w, params.padding_w,
                 params.dilation_w),
        terms_(params.taps()) {}

  // The gradient of input row ih of image n; offsets: those of the image.
  void run(int64_t n, int64_t ih, const Offset* offsets, Out* gx, int64_t gx_stride) {
    const S* image = static_cast<const S*>(grad_.data) + n * grad_.batch_stride;
    for (int64_t iw = 0; iw < in_width_; ++iw) {
      int64_t count = 0;
      for (const auto* row = rows_.begin(ih); row != rows_.end(ih); ++row) {
        for (const auto* column = columns_.begin(iw); column != columns_.end(iw); ++column) {
          terms_[count++] = {
              image + row->window * grad_.row_stride + column->window * grad_.pixel_stride,
              offsets + (row->window * grad_.width + column->window) * grad_.channels,
              static_cast<int>(row->tap * kernel_w_ + column->tap)};
        }
      }
      accumulate(count, gx + iw * gx_stride);
    }
  }

 private:
  // An output that may have chosen the pixel: its gradient, the taps its channels chose, the
  // pixel's tap.
  struct Term {
    const S* grad;
    const Offset* winner;
    int tap;
  };

  void accumulate(int64_t count, Out* gx) {
    switch (count) {  // a pixel of a 3x3/s2 pool lies in 1, 2 or 4 windows
      case 1:
        return sum_winners<1>(count, gx);
      case 2:
        return sum_winners<2>(count, gx);
      case 4:
        return sum_winners<4>(count, gx);
      default:
        return sum_winners<0>(count, gx);
    }
  }

  template <int kCount>
  void sum_winners(int64_t count, Out* gx) {
    if constexpr (kCount != 0) count = kCount;
    const Term* terms = terms_.data();
    const int64_t channels = grad_.channels;
    int64_t c = 0;
    if constexpr (kParts<S> == 2 && sizeof(Offset) == 1) {
      for (; c < channels; c += kBlock<S>) {
        Block<S> sum{};
        for (int64_t t = 0; t < count; ++t) {
          const auto term =
              load_chosen(terms[t].grad + c, terms[t].winner + c, terms[t].tap, channels - c);
          for (int p = 0; p < kParts<S>; ++p) sum.part[p] += term.part[p];
        }
        store_split_up_to(gx + c, sum, channels - c);
      }
      return;
    }
    for (; c + kWidth <= channels; c += kWidth) {
      Vec<A> sum{};
      for (int64_t t = 0; t < count; ++t) {
        const Mask<A> winner = load_lanes<Mask<A>>(terms[t].winner + c, kWidth);
        sum += winner == terms[t].tap ? load(terms[t].grad + c) : Vec<A>{};
      }
      store(gx + c, sum);
    }
    if (c == channels) return;
    Vec<A> sum{};
    for (int64_t t = 0; t < count; ++t) {
      const Mask<A> winner = load_lanes<Mask<A>>(terms[t].winner + c, channels - c);
      sum += winner == terms[t].tap ? load_up_to(terms[t].grad + c, channels - c) : Vec<A>{};
    }
    store_up_to(gx + c, sum, channels - c);
  }

  const Map& grad_;
  int64_t in_width_, kernel_w_;
  WindowTable rows_, columns_;
  Scratch<Term> terms_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
