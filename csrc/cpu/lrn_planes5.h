// Local response normalization of NCHW planes for windows of five: four channels at a time, so that
// their windows share loads and sums in registers.
#pragma once
#include "block.h"
#include "lrn_planes.h"

namespace fastalex::cpu::FASTALEX_ISA {

inline constexpr int64_t kSlice = 4;               // channels of one pass
inline constexpr int64_t kSliceRows = kSlice + 4;  // channels that their windows reach
inline constexpr int64_t kGradientBlock = 256;     // pixels whose rings of products stay in L1

// sums[j] = v[j] + ... + v[j + 4]
template <class V>
inline void sums_of_five(const V (&v)[kSliceRows], V (&sums)[kSlice]) {
  const V first = v[0] + v[1], inner = v[2] + v[3], outer = v[4] + v[5], last = v[6] + v[7];
  const V middle = inner + outer;
  sums[0] = (first + inner) + v[4];
  sums[1] = v[1] + middle;
  sums[2] = middle + v[6];
  sums[3] = v[3] + (outer + last);
}

// The rows under the windows of channels [c, c + 4) of a group: zeros where the group has no such
// channel.
template <class T>
struct SliceRows {
  const T* rows[kSliceRows];

  template <class RowOf>
  SliceRows(int64_t c, int64_t channels, const T* zeros, RowOf&& row_of) {
    for (int64_t j = 0; j < kSliceRows; ++j) {
      const int64_t channel = c - 2 + j;
      rows[j] = channel < 0 || channel >= channels ? zeros : row_of(channel);
    }
  }
};

// s^-beta for the bases of a slice, in `powers`: one question for all whether they are ordinary.
template <Beta kBeta, class S, class A>
inline void inverse_powers(const Block<S> (&s)[kSlice], A beta, Block<S> (&powers)[kSlice]) {
  StrangeValues<A> strange;
  for (int p = 0; p < kParts<S>; ++p) {
    for (int64_t j = 0; j < kSlice; ++j) {
      powers[j].part[p] = ordinary_power<kBeta, S>(s[j].part[p], beta, strange);
    }
  }
  if (__builtin_expect(!strange.any(), 1)) return;
  for (int64_t j = 0; j < kSlice; ++j) {
    powers[j] = by_part<S>([&](int p) { return exact_power<kBeta>(s[j].part[p], beta); });
  }
}

// The first `count` pixels from the i-th on: inputs under the windows of a slice, and s of its
// channels.
template <class S, class A>
inline void load_slice(const SliceRows<S>& under, const LrnWindow<A>& window, int64_t i,
                       int64_t count, Block<S> (&values)[kSliceRows], Block<S> (&bases)[kSlice]) {
  for (int64_t j = 0; j < kSliceRows; ++j) {
    values[j] = load_block_up_to(under.rows[j] + i, count);
  }
  for (int p = 0; p < kParts<S>; ++p) {
    Vec<A> squares[kSliceRows], sums[kSlice];
    for (int64_t j = 0; j < kSliceRows; ++j) squares[j] = values[j].part[p] * values[j].part[p];
    sums_of_five(squares, sums);
    for (int64_t j = 0; j < kSlice; ++j) bases[j].part[p] = window.base(sums[j]);
  }
}

// y = lrn(x). Loads each input twice, the second time from L1, and stores each output once.
template <class S, Beta kBeta>
class PlaneNormalizer5 final : public LrnForward<S> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;

 public:
  PlaneNormalizer5(const LrnParams& params, int64_t channels) : window_(params, channels) {}

  void run(const S* x, int64_t x_stride, S* y, int64_t y_stride, int64_t width) override {
    for (int64_t first = 0; first < width; first += kPlaneBlock) {
      const int64_t count = std::min(kPlaneBlock, width - first);
      for (int64_t group = 0; group < window_.groups; ++group) {
        const int64_t channel = group * window_.group_channels;
        for (int64_t c = 0; c < window_.group_channels; c += kSlice) {
          run_slice(x + channel * x_stride + first, x_stride, c,
                    y + (channel + c) * y_stride + first, y_stride, count);
        }
      }
    }
  }

  // Channels [c, c + 4) of a group, or those it has of them. x: its channel 0; y: channel c; at
  // most kPlaneBlock pixels.
  void run_slice(const S* x, int64_t x_stride, int64_t c, S* y, int64_t y_stride, int64_t count) {
    const LrnWindow<A> window = window_;  // a copy that no store through y can alias
    const int64_t channels = std::min(kSlice, window.group_channels - c);
    const SliceRows<S> under(c, window.group_channels, zeros_,
                             [&](int64_t channel) { return x + channel * x_stride; });
    const S* ahead = x + (c + kSliceRows - 2) * x_stride;  // what the next slice adds
    for (int64_t i = 0; i < count; i += kBlock<S>) {
      Block<S> values[kSliceRows], bases[kSlice], powers[kSlice];
      load_slice(under, window, i, count - i, values, bases);
      inverse_powers<kBeta>(bases, window.beta, powers);
      for (int64_t j = 0; j < kSlice; ++j) __builtin_prefetch(ahead + j * x_stride + i);
      for (int64_t j = 0; j < kSlice; ++j) {
        if (j >= channels) break;
        const auto result =
            by_part<S>([&](int p) { return values[2 + j].part[p] * powers[j].part[p]; });
        store_block_up_to(y + j * y_stride + i, result, count - i);
      }
    }
  }

 private:
  LrnWindow<A> window_;
  S zeros_[kPlaneBlock] = {};
};

// gx as in PixelGradient; the rings hold the parts of a block one after the other. One slice makes
// its products, and the slice before it, whose windows they complete, its gradients.
template <class S, class G, Beta kBeta>
class PlaneGradient5 final : public LrnBackward<S, G> {
  using A = compute_t<S>;
  static constexpr int64_t kWidth = kLanes<A>;
  static constexpr int64_t kProductRows = 3 * kSlice, kDirectRows = 2 * kSlice;

 public:
  PlaneGradient5(const LrnParams& params, int64_t channels)
      : window_(params, channels),
        products_(kProductRows * kGradientBlock),
        direct_(kDirectRows * kGradientBlock) {}

  void run(const G* g, int64_t g_stride, const S* x, int64_t x_stride, S* gx, int64_t gx_stride,
           int64_t width) override {
    for (int64_t first = 0; first < width; first += kGradientBlock) {
      const int64_t count = std::min(kGradientBlock, width - first);
      for (int64_t group = 0; group < window_.groups; ++group) {
        const int64_t channel = group * window_.group_channels;
        run_group(g + channel * g_stride + first, g_stride, x + channel * x_stride + first,
                  x_stride, gx + channel * gx_stride + first, gx_stride, count);
      }
    }
  }

 private:
  A* product(int64_t channel) { return products_.data() + channel % kProductRows * kGradientBlock; }
  A* direct(int64_t channel) { return direct_.data() + channel % kDirectRows * kGradientBlock; }

  void run_group(const G* g, int64_t g_stride, const S* x, int64_t x_stride, S* gx,
                 int64_t gx_stride, int64_t count) {
    const int64_t channels = window_.group_channels;
    for (int64_t c = 0; c < channels + kSlice; c += kSlice) {
      if (c < channels) multiply(g, g_stride, x, x_stride, c, count);
      if (c >= kSlice) gather(x, x_stride, c - kSlice, gx, gx_stride, count);
    }
  }

  // g s^-beta and g x s^(-beta - 1) of channels [c, c + 4).
  void multiply(const G* g, int64_t g_stride, const S* x, int64_t x_stride, int64_t c,
                int64_t count) {
    const LrnWindow<A> window = window_;
    const int64_t channels = std::min(kSlice, window.group_channels - c);
    const SliceRows<S> under(c, window.group_channels, zeros_,
                             [&](int64_t channel) { return x + channel * x_stride; });
    const S* x_ahead = x + (c + kSliceRows - 2) * x_stride;  // what the next slice adds
    const G* g_ahead = g + (c + kSlice) * g_stride;
    A *product_rows[kSlice], *direct_rows[kSlice];
    for (int64_t j = 0; j < kSlice; ++j) {
      product_rows[j] = product(c + j);
      direct_rows[j] = direct(c + j);
    }
    for (int64_t i = 0; i < count; i += kBlock<S>) {
      Block<S> values[kSliceRows], bases[kSlice];
      load_slice(under, window, i, count - i, values, bases);
      for (int64_t j = 0; j < kSlice; ++j) {
        __builtin_prefetch(x_ahead + j * x_stride + i);
        __builtin_prefetch(g_ahead + j * g_stride + i);
      }
      for (int64_t j = 0; j < kSlice; ++j) {
        if (j >= channels) break;
        const auto grad = load_split_up_to<S>(g + (c + j) * g_stride + i, count - i);
        for (int p = 0; p < kParts<S>; ++p) {
          const auto [direct, product] = gradient_terms<kBeta, S>(
              grad.part[p], values[2 + j].part[p], bases[j].part[p], window.beta);
          store(direct_rows[j] + i + p * kWidth, direct);
          store(product_rows[j] + i + p * kWidth, product);
        }
      }
    }
  }

  void gather(const S* x, int64_t x_stride, int64_t c, S* gx, int64_t gx_stride, int64_t count) {
    const int64_t channels = std::min(kSlice, window_.group_channels - c);
    const Vec<A> coefficient = broadcast(A(-2) * window_.scale * window_.beta);
    const SliceRows<A> under(c, window_.group_channels, zero_products_,
                             [&](int64_t channel) { return product(channel); });
    const A* direct_rows[kSlice];
    for (int64_t j = 0; j < kSlice; ++j) direct_rows[j] = direct(c + j);
    for (int64_t i = 0; i < count; i += kBlock<S>) {
      Block<S> sums[kSlice];
      for (int p = 0; p < kParts<S>; ++p) {
        Vec<A> products[kSliceRows], of_part[kSlice];
        for (int64_t j = 0; j < kSliceRows; ++j) products[j] = load(under.rows[j] + i + p * kWidth);
        sums_of_five(products, of_part);
        for (int64_t j = 0; j < kSlice; ++j) sums[j].part[p] = of_part[j];
      }
      for (int64_t j = 0; j < kSlice; ++j) {
        if (j >= channels) break;
        const auto value = load_block_up_to(x + (c + j) * x_stride + i, count - i);
        const auto gradient = by_part<S>([&](int p) {
          return fused_multiply_add(coefficient * value.part[p], sums[j].part[p],
                                    load(direct_rows[j] + i + p * kWidth));
        });
        store_block_up_to(gx + (c + j) * gx_stride + i, gradient, count - i);
      }
    }
  }

  LrnWindow<A> window_;
  Scratch<A> products_, direct_;
  S zeros_[kGradientBlock] = {};
  A zero_products_[kGradientBlock] = {};
};

}  // namespace fastalex::cpu::FASTALEX_ISA
