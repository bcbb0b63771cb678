// Max-pooling of one row of outputs, forward and backward, for both layouts.
#pragma once
#include <algorithm>
#include <cstddef>
#include <limits>

#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace fastalex::cpu::FASTALEX_ISA {

// The largest value so far and the tap it came from. torch's order: a NaN beats everything, the
// last of several NaNs wins, and the first of equal values.
template <class A, bool kTrack>
struct Winner {
  Vec<A> value;
  Mask<A> tap;

  void start(Vec<A> v, int first_tap) {
    value = v;
    if constexpr (kTrack) tap = Mask<A>{} + first_tap;
  }
  void challenge(Vec<A> v, int challenger_tap) {
    const Mask<A> wins = (v > value) | (v != v);
    value = wins ? v : value;
    if constexpr (kTrack) tap = wins ? Mask<A>{} + challenger_tap : tap;
  }
};

// The largest of the vectors that at(0) to at(count - 1) give, NaN winning, without tracking where
// it came from. One maximum a vector, and a comparison to notice a NaN, which is rare; then the
// careful way.
template <class A, class At>
inline Vec<A> largest(int64_t count, At&& at) {
  Vec<A> value = at(0);
  StrangeValues<A> nans;
  int64_t t = 1;
  if (count % 2 == 0) {
    const Vec<A> v = at(t++);
    nans.see_nans(value, v);
    value = larger<A>(v, value);
  } else {
    nans.see_nans(value, value);
  }
  for (; t < count; t += 2) {
    const Vec<A> v = at(t), w = at(t + 1);
    nans.see_nans(v, w);
    value = larger<A>(w, larger<A>(v, value));
  }
  if (__builtin_expect(!nans.any(), 1)) return value;
  Winner<A, false> winner;
  winner.start(at(0), 0);
  for (t = 1; t < count; ++t) winner.challenge(at(t), 0);
  return winner.value;
}

// Taps of a window that starts at `start` (negative in the padding): [first, last) lie inside [0,
// extent).
struct TapRange {
  int64_t first, last;

  TapRange(int64_t start, int64_t taps, int64_t dilation, int64_t extent)
      : first(start >= 0 ? 0 : std::min(taps, (-start + dilation - 1) / dilation)),
        last(start >= extent ? 0 : std::min(taps, (extent - start + dilation - 1) / dilation)) {}

  // A dilated window can fall between two edges of a small map and hold padding alone.
  bool empty() const { return first >= last; }
};

// torch gives -inf to a window of padding alone; nobody is its winner, and unpooling passes it
// over.
template <class S, class Offset>
inline void fill_empty_windows(S* y, Offset* offsets, int64_t count) {
  using A = compute_t<S>;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store_up_to(y + i, broadcast(-std::numeric_limits<A>::infinity()), count - i);
  }
  if (offsets != nullptr) std::memset(offsets, 0, count * sizeof(Offset));
}

// --- channels_last

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
    for (int64_t c = 0; c < channels_; c += kWidth) {
      const int64_t left = channels_ - c;
      const auto tap = [&](int64_t t) { return load_up_to(sources[t] + c, left); };
      if constexpr (kTrack) {
        Winner<A, true> winner;
        winner.start(tap(0), taps[0]);
        for (int64_t t = 1; t < count; ++t) winner.challenge(tap(t), taps[t]);
        store_up_to(y + c, winner.value, left);
        store_lanes(offsets + c, winner.tap, left);
      } else {
        store_up_to(y + c, largest<A>(count, tap), left);
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

// --- NCHW

// One row of outputs of one plane.
template <class S, class Offset, bool kTrack>
class PlanePool {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PlanePool(const PoolParams& params, int64_t in_width, int64_t out_width)
      : params_(params), in_width_(in_width), out_width_(out_width) {
    // Columns whose windows need no bounds check.
    const int64_t span = (params.kernel_w - 1) * params.dilation_w;
    inner_first_ = std::min(out_width, (params.padding_w + params.stride_w - 1) / params.stride_w);
    const int64_t room = in_width - 1 - span + params.padding_w;
    inner_last_ = room < 0 ? 0 : std::min(out_width, room / params.stride_w + 1);
    inner_last_ = std::max(inner_first_, inner_last_);
  }

  void run(const S* const* rows, TapRange kh_range, S* y, Offset* offsets) {
    if (kh_range.empty()) return fill_empty_windows(y, offsets, out_width_);
    for (int64_t ow = 0; ow < inner_first_; ++ow) run_checked(rows, kh_range, y, offsets, ow);
    int64_t ow = inner_first_;
    for (; ow + kWidth <= inner_last_; ow += kWidth) run_vector(rows, kh_range, y, offsets, ow);
    if (ow < inner_last_ && inner_last_ - inner_first_ >= kWidth) {
      // Overlapping the previous vector costs less than a partial one, and writes the same values.
      run_vector(rows, kh_range, y, offsets, inner_last_ - kWidth);
      ow = inner_last_;
    }
    for (; ow < out_width_; ++ow) run_checked(rows, kh_range, y, offsets, ow);
  }

 private:
  void run_vector(const S* const* rows, TapRange kh_range, S* y, Offset* offsets, int64_t ow) {
    const int64_t start = ow * params_.stride_w - params_.padding_w;
    Winner<A, kTrack> winner;
    for (int64_t kh = kh_range.first; kh < kh_range.last; ++kh) {
      const S* row = rows[kh - kh_range.first] + start;
      for (int64_t kw = 0; kw < params_.kernel_w; ++kw) {
        const Vec<A> v = load_strided(row + kw * params_.dilation_w, params_.stride_w);
        const int tap = static_cast<int>(kh * params_.kernel_w + kw);
        if (kh == kh_range.first && kw == 0) {
          winner.start(v, tap);
        } else {
          winner.challenge(v, tap);
        }
      }
    }
    store(y + ow, winner.value);
    if constexpr (kTrack) store_lanes(offsets + ow, winner.tap, kWidth);
  }

  void run_checked(const S* const* rows, TapRange kh_range, S* y, Offset* offsets, int64_t ow) {
    const int64_t start = ow * params_.stride_w - params_.padding_w;
    const TapRange kw_range(start, params_.kernel_w, params_.dilation_w, in_width_);
    if (kw_range.empty()) return fill_empty_windows(y + ow, kTrack ? offsets + ow : nullptr, 1);
    const S* best = rows[0] + start + kw_range.first * params_.dilation_w;
    A best_value = widen_one(*best);
    int64_t tap = kh_range.first * params_.kernel_w + kw_range.first;
    for (int64_t kh = kh_range.first; kh < kh_range.last; ++kh) {
      for (int64_t kw = kw_range.first; kw < kw_range.last; ++kw) {
        const S* candidate = rows[kh - kh_range.first] + start + kw * params_.dilation_w;
        const A value = widen_one(*candidate);
        if (value > best_value || value != value) {
          best = candidate;
          best_value = value;
          tap = kh * params_.kernel_w + kw;
        }
      }
    }
    y[ow] = *best;
    if constexpr (kTrack) offsets[ow] = static_cast<Offset>(tap);
  }

  PoolParams params_;
  int64_t in_width_, out_width_;
  int64_t inner_first_, inner_last_;
};

// The gradient of rows [first_row, last_row) of one plane, into `band` (zeroed here). Outputs are
// visited in order and add to their winner, so the sum's order is the same however a plane is cut
// into bands.
template <class S, class Offset>
class PlaneUnpool {
  using A = compute_t<S>;

 public:
  PlaneUnpool(const PoolParams& params, int64_t in_height, int64_t in_width)
      : params_(params), in_height_(in_height), in_width_(in_width), displacement_(params.taps()) {
    for (int64_t tap = 0; tap < params.taps(); ++tap) {
      displacement_[tap] = tap / params.kernel_w * params.dilation_h * in_width +
                           tap % params.kernel_w * params.dilation_w;
    }
  }

  void run(const S* grad, const Offset* offsets, int64_t out_height, int64_t out_width,
           int64_t first_row, int64_t last_row, A* band) {
    const int64_t band_size = (last_row - first_row) * in_width_;
    std::memset(band, 0, band_size * sizeof(A));
    const int64_t reach = (params_.kernel_h - 1) * params_.dilation_h;
    const int64_t first = std::max<int64_t>(0, first_row + params_.padding_h - reach);
    const int64_t oh_first = (first + params_.stride_h - 1) / params_.stride_h;
    const int64_t oh_last =
        std::min(out_height, (last_row - 1 + params_.padding_h) / params_.stride_h + 1);
    for (int64_t oh = oh_first; oh < oh_last; ++oh) {
      const int64_t top = oh * params_.stride_h - params_.padding_h;
      if (TapRange(top, params_.kernel_h, params_.dilation_h, in_height_).empty()) continue;
      const int64_t base = (top - first_row) * in_width_ - params_.padding_w;
      for (int64_t ow = 0; ow < out_width; ++ow) {
        if (may_be_empty_ && empty_column(ow)) continue;
        const int64_t at =
            base + ow * params_.stride_w + displacement_[offsets[oh * out_width + ow]];
        if (static_cast<uint64_t>(at) < static_cast<uint64_t>(band_size)) {
          band[at] += widen_one(grad[oh * out_width + ow]);
        }
      }
    }
  }

 private:
  bool empty_column(int64_t ow) const {
    const int64_t left = ow * params_.stride_w - params_.padding_w;
    return TapRange(left, params_.kernel_w, params_.dilation_w, in_width_).empty();
  }

  PoolParams params_;
  int64_t in_height_, in_width_;
  bool may_be_empty_ = params_.dilation_w > 1 && params_.padding_w > 0;
  Scratch<int64_t> displacement_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
