// Local response normalization of NCHW planes: the pixels of a channel are adjacent.
#pragma once
#include "lrn_math.h"
#include "lrn_rows.h"
#include "scratch.h"

namespace fastalex::cpu::FASTALEX_ISA {

// Pixels of one pass over the channels: the rows of a window of five stay in L1, and each row is a
// few kilobytes that the hardware prefetcher can follow.
inline constexpr int64_t kPlaneBlock = 512;

// The last `count` rows of kPlaneBlock values, by row number; rows outside [0, limit) read as
// zeros.
template <class A>
class RowRing {
 public:
  explicit RowRing(int64_t count) : count_(count), values_((count + 1) * kPlaneBlock) {
    std::memset(values_.data(), 0, (count + 1) * kPlaneBlock * sizeof(A));
  }
  A* row(int64_t number) { return values_.data() + (1 + number % count_) * kPlaneBlock; }
  const A* row_or_zeros(int64_t number, int64_t limit) {
    return number < 0 || number >= limit ? values_.data() : row(number);
  }

 private:
  int64_t count_;
  Scratch<A> values_;
};

// The rows of a window, and their sum at one position.
template <class A>
class WindowRows {
 public:
  explicit WindowRows(int64_t size) : size_(size), rows_(size) {}

  void point_at(RowRing<A>& ring, int64_t first, int64_t limit) {
    for (int64_t j = 0; j < size_; ++j) rows_[j] = ring.row_or_zeros(first + j, limit);
  }

  Vec<A> sum(int64_t i) {
    Vec<A> total = load(rows_[0] + i);
    for (int64_t j = 1; j < size_; ++j) total += load(rows_[j] + i);
    return total;
  }

 private:
  int64_t size_;
  Scratch<const A*> rows_;
};

template <class S, class A>
inline void square_row(const S* x, A* squares, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const Vec<A> v = load_up_to(x + i, count - i);
    store(squares + i, v * v);
  }
}

// y = lrn(x) for `width` adjacent pixels of C channels, one channel after the other; rings hold
// squares, so each element is read twice, the second time from L1. Same FLOPs as PixelNormalizer.
template <class S, Beta kBeta>
class PlaneNormalizer final : public LrnForward<S> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PlaneNormalizer(const LrnParams& params, int64_t channels)
      : window_(params, channels), squares_(window_.size()), rows_(window_.size()) {}

  void run(const S* x, int64_t x_stride, S* y, int64_t y_stride, int64_t width) override {
    for (int64_t first = 0; first < width; first += kPlaneBlock) {
      const int64_t count = std::min(kPlaneBlock, width - first);
      for (int64_t group = 0; group < window_.groups; ++group) {
        const int64_t channel = group * window_.group_channels;
        run_group(x + channel * x_stride + first, x_stride, y + channel * y_stride + first,
                  y_stride, count);
      }
    }
  }

 private:
  void run_group(const S* x, int64_t x_stride, S* y, int64_t y_stride, int64_t count) {
    const int64_t channels = window_.group_channels;
    for (int64_t ahead = 0; ahead < channels + window_.after; ++ahead) {
      if (ahead < channels) square_row(x + ahead * x_stride, squares_.row(ahead), count);
      const int64_t c = ahead - window_.after;
      if (c < 0) continue;
      rows_.point_at(squares_, c - window_.before, channels);
      scale_row(x + c * x_stride, y + c * y_stride, count);
    }
  }

  void scale_row(const S* x, S* y, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec<A> s = window_.base(rows_.sum(i));
      store_up_to(y + i, load_up_to(x + i, count - i) * inverse_power<kBeta, S>(s, window_.beta),
                  count - i);
    }
  }

  LrnWindow<A> window_;
  RowRing<A> squares_;
  WindowRows<A> rows_;
};

// gx as in PixelGradient. Three rings run one behind the other: squares, then products `after` rows
// behind, then the gradient another `before` rows behind, whose mirrored window has closed by then.
template <class S, class G, Beta kBeta>
class PlaneGradient final : public LrnBackward<S, G> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PlaneGradient(const LrnParams& params, int64_t channels)
      : window_(params, channels),
        squares_(window_.size()),
        products_(window_.size()),
        direct_(window_.before + 1),
        rows_(window_.size()) {}

  void run(const G* g, int64_t g_stride, const S* x, int64_t x_stride, S* gx, int64_t gx_stride,
           int64_t width) override {
    for (int64_t first = 0; first < width; first += kPlaneBlock) {
      const int64_t count = std::min(kPlaneBlock, width - first);
      for (int64_t group = 0; group < window_.groups; ++group) {
        const int64_t channel = group * window_.group_channels;
        run_group(g + channel * g_stride + first, g_stride, x + channel * x_stride + first,
                  x_stride, gx + channel * gx_stride + first, gx_stride, count);
      }
    }
  }

 private:
  void run_group(const G* g, int64_t g_stride, const S* x, int64_t x_stride, S* gx,
                 int64_t gx_stride, int64_t count) {
    const int64_t channels = window_.group_channels;
    for (int64_t ahead = 0; ahead < channels + window_.after + window_.before; ++ahead) {
      if (ahead < channels) square_row(x + ahead * x_stride, squares_.row(ahead), count);
      const int64_t middle = ahead - window_.after;
      if (middle >= 0 && middle < channels) {
        rows_.point_at(squares_, middle - window_.before, channels);
        multiply_row(g + middle * g_stride, x + middle * x_stride, middle, count);
      }
      const int64_t last = middle - window_.before;
      if (last >= 0) {
        rows_.point_at(products_, last - window_.after, channels);
        gather_row(x + last * x_stride, gx + last * gx_stride, direct_.row(last), count);
      }
    }
  }

  void multiply_row(const G* g, const S* x, int64_t channel, int64_t count) {
    A* product = products_.row(channel);
    A* direct = direct_.row(channel);
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec<A> s = window_.base(rows_.sum(i));
      const auto terms = gradient_terms<kBeta, S>(load_up_to(g + i, count - i),
                                                  load_up_to(x + i, count - i), s, window_.beta);
      store(direct + i, terms.direct);
      store(product + i, terms.product);
    }
  }

  void gather_row(const S* x, S* gx, const A* direct, int64_t count) {
    const Vec<A> coefficient = broadcast(A(-2) * window_.scale * window_.beta);
    for (int64_t i = 0; i < count; i += kWidth) {
      const Vec<A> v = coefficient * load_up_to(x + i, count - i);
      store_up_to(gx + i, fused_multiply_add(v, rows_.sum(i), load(direct + i)), count - i);
    }
  }

  LrnWindow<A> window_;
  RowRing<A> squares_;
  RowRing<A> products_;
  RowRing<A> direct_;
  WindowRows<A> rows_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
