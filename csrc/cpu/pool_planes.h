// Max-pooling of one row of outputs, forward and backward, of NCHW planes.
#pragma once
#include <array>
#include <utility>

#include "pool_window.h"

namespace fastalex::cpu::FASTALEX_ISA {

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
    if constexpr (!kTrack) {
      if (three_by_two_ && store_largest(rows, kh_range.last - kh_range.first, start, y + ow))
        return;
    }
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

  // Windows of three columns, two apart: each column's maximum first, which neighbours share.
  // False, and nothing stored, where a NaN came up, which a plain maximum loses.
  bool store_largest(const S* const* rows, int64_t count, int64_t start, S* y) {
    StrangeValues<A> nans;
    if constexpr (kParts<S> == 2) {  // a block's parts are every window's first and second column
      constexpr A kLowest = -std::numeric_limits<A>::infinity();
      Vec<A> first = broadcast(kLowest), second = first, third = first;
      for (int64_t r = 0; r < count; ++r) {
        const auto [even, odd] = load_block(rows[r] + start).part;
        const Vec<A> last = load_block(rows[r] + start + 1).part[1];
        nans.see_nans(even, odd);
        nans.see_nans(last, last);
        first = larger<A>(even, first);
        second = larger<A>(odd, second);
        third = larger<A>(last, third);
      }
      if (__builtin_expect(nans.any(), 0)) return false;
      store(y, larger<A>(third, larger<A>(second, first)));
      return true;
    }
    const auto column = [&](int64_t at) {
      Vec<A> value = load(rows[0] + at);
      nans.see_nans(value, value);
      for (int64_t r = 1; r < count; ++r) {
        const Vec<A> v = load(rows[r] + at);
        nans.see_nans(v, v);
        value = larger<A>(v, value);
      }
      return value;
    };
    const Vec<A> low = column(start), high = column(start + kWidth);
    // One column of it is new: the last window's last, beyond which nothing may be read.
    const Vec<A> end = column(start + kWidth + 1);
    const auto [first, second, third] = [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      const Vec<A> even = __builtin_shufflevector(low, high, 2 * kLane...);
      return std::array{
          even, __builtin_shufflevector(low, high, 2 * kLane + 1 ...),
          __builtin_shufflevector(even, end, (kLane + 1 < kWidth ? kLane + 1 : 2 * kWidth - 1)...)};
    }(std::make_integer_sequence<int, kWidth>{});
    if (__builtin_expect(nans.any(), 0)) return false;
    store(y, larger<A>(third, larger<A>(second, first)));
    return true;
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
  bool three_by_two_ = params_.kernel_w == 3 && params_.stride_w == 2 && params_.dilation_w == 1;
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
