// Winograd transforms of a row of tiles in both dimensions, for one nested tile pair.
#pragma once
#include <algorithm>

#include "../kernels.h"
#include "inline.h"
#include "transforms.h"

namespace fastalex::cpu::FASTALEX_ISA {

template <int kTaps, int kBig>
struct WinogradRows {
  using Big = Tile<kTaps, kBig, kBig>;
  using Small = Tile<kTaps, kBig, kBig - 1>;
  static constexpr int kPoints = Big::kPoints;
  static constexpr int kLane = kLanes<float>;
  static constexpr int kBlock = conv::kBlock;

  // Calls body(tile index, column offset in outputs, tile type) along a row of tiles.
  template <class Body>
  FASTALEX_INLINE static void for_each_tile(conv::Cover columns, Body&& body) {
    for (int t = 0; t < columns.big; ++t) body(t, t * kBig, Big{});
    for (int t = 0; t < columns.small; ++t) {
      body(columns.big + t, columns.big * kBig + t * (kBig - 1), Small{});
    }
  }

  // --- input: B^T d B ---------------------------------------------------------------------------

  // One tile, one vector of channels. `column` is its first pixel, `target` its offset in a point.
  template <class Y, class X>
  FASTALEX_INLINE static void input_tile(const conv::InputRowCall& call, ptrdiff_t channel,
                                         int column, float* const* points, ptrdiff_t target) {
    F32 half[X::kPoints][Y::kPoints];
    const int begin = std::max(0, -column);
    const int end = std::min<int>(X::kPoints, call.width - column);
    for (int x = 0; x < X::kPoints; ++x) {
      if (x < begin || x >= end) {
        for (int y = 0; y < Y::kPoints; ++y) half[x][y] = F32{};
        continue;
      }
      const ptrdiff_t source = (column + x) * call.pixel_stride + channel;
      F32 d[Y::kPoints];
#pragma GCC unroll 9
      for (int y = 0; y < Y::kPoints; ++y) {
        d[y] = load(call.rows[y] + source);
        // The next tile's pixels lie too far apart for the hardware prefetcher.
        __builtin_prefetch(call.rows[y] + source + X::kOutputs * call.pixel_stride);
      }
      Y::input(d, half[x]);
    }
#pragma GCC unroll 1
    for (int y = 0; y < Y::kPoints; ++y) {
      F32 d[X::kPoints], v[X::kPoints];
#pragma GCC unroll 9
      for (int x = 0; x < X::kPoints; ++x) d[x] = half[x][y];
      X::input(d, v);
#pragma GCC unroll 9
      for (int x = 0; x < X::kPoints; ++x) {
        store(points[y * kPoints + x] + target, v[x]);
      }
    }
  }

  template <class Y>
  static void input_row_of(const conv::InputRowCall& call) {
    float* points[kPoints * kPoints];
    std::copy_n(call.points, kPoints * kPoints, points);
    for (int block = 0; block < call.blocks; ++block) {
      for_each_tile(call.columns, [&]<class X>(int tile, int column, X) {
        for (int lane = 0; lane < kBlock; lane += kLane) {
          input_tile<Y, X>(call, block * kBlock + lane, call.first_column + column, points,
                           static_cast<ptrdiff_t>(tile) * kBlock + lane);
        }
      });
      for (int p = 0; p < kPoints * kPoints; ++p) points[p] += call.block_strides[p];
    }
  }

  static void input_row(const conv::InputRowCall& call) {
    call.big_row ? input_row_of<Big>(call) : input_row_of<Small>(call);
  }

  // --- output: A^T m A --------------------------------------------------------------------------

  // Returns a vector that holds NaN where a result was NaN or infinite, and zero elsewhere.
  template <class Y, class X, bool kWhole>
  FASTALEX_INLINE static F32 output_tile(const conv::OutputRowCall& call, ptrdiff_t source,
                                         int valid, F32 bias, F32 floor, float* output) {
    F32 half[X::kPoints][Y::kOutputs];
#pragma GCC unroll 1
    for (int x = 0; x < X::kPoints; ++x) {
      F32 m[Y::kPoints];
#pragma GCC unroll 9
      for (int y = 0; y < Y::kPoints; ++y) m[y] = load(call.points[y * kPoints + x] + source);
      Y::output(m, half[x]);
    }
    F32 suspicion{};
    const ptrdiff_t pixel_stride = call.pixel_stride, row_stride = call.row_stride;
#pragma GCC unroll 1
    for (int y = 0; y < Y::kOutputs; ++y, output += row_stride) {
      F32 m[X::kPoints], sums[X::kOutputs];
#pragma GCC unroll 9
      for (int x = 0; x < X::kPoints; ++x) m[x] = half[x][y];
      X::output(m, sums);
#pragma GCC unroll 9
      for (int x = 0; x < X::kOutputs; ++x) {
        const F32 sum = sums[x] + bias;
        suspicion = fused_multiply_add(sum, F32{}, suspicion);
        const F32 value = at_least(sum, floor);
        float* pixel = output + x * pixel_stride;
        if constexpr (kWhole) {
          store(pixel, value);
        } else {
          store_partial(pixel, value, valid);
        }
      }
    }
    return suspicion;
  }

  template <class Y, bool kWhole>
  static void output_vector(const conv::OutputRowCall& call, int v, int valid) {
    const F32 floor = F32{} + (call.relu ? 0.0f : -__builtin_inff());
    const int channel = v * kLane;
    const F32 bias = call.bias ? load(call.bias + channel) : F32{};
    for_each_tile(call.columns, [&]<class X>(int tile, int column, X) {
      const ptrdiff_t source = (static_cast<ptrdiff_t>(tile) * call.vectors + v) * kLane;
      float* output = call.output + column * call.pixel_stride + channel;
      const F32 suspicion = output_tile<Y, X, kWhole>(call, source, valid, bias, floor, output);
      if (any_nan(suspicion)) call.nonfinite[tile] = 1;
    });
  }

  template <class Y>
  static void output_row_of(const conv::OutputRowCall& call) {
    for (int v = 0; v < call.vectors; ++v) {
      const int valid = call.channels - v * kLane;
      if (valid >= kLane) {
        output_vector<Y, true>(call, v, kLane);
      } else if (valid > 0) {
        output_vector<Y, false>(call, v, valid);
      }
    }
  }

  static void output_row(const conv::OutputRowCall& call) {
    call.big_row ? output_row_of<Big>(call) : output_row_of<Small>(call);
  }

  // --- gradient: A dy A^T -----------------------------------------------------------------------

  template <class Y, class X>
  FASTALEX_INLINE static void gradient_tile(const conv::GradientRowCall& call, int channel,
                                            int valid, const float* gradient, ptrdiff_t target) {
    F32 half[X::kOutputs][Y::kPoints];
#pragma GCC unroll 1
    for (int x = 0; x < X::kOutputs; ++x) {
      F32 dy[Y::kOutputs];
#pragma GCC unroll 9
      for (int y = 0; y < Y::kOutputs; ++y) {
        const float* pixel = gradient + y * call.row_stride + x * call.pixel_stride + channel;
        dy[y] = valid >= kLane ? load(pixel) : load_partial(pixel, valid);
      }
      Y::gradient(dy, half[x]);
    }
#pragma GCC unroll 1
    for (int y = 0; y < Y::kPoints; ++y) {
      F32 dy[X::kOutputs], points[X::kPoints];
#pragma GCC unroll 9
      for (int x = 0; x < X::kOutputs; ++x) dy[x] = half[x][y];
      X::gradient(dy, points);
#pragma GCC unroll 9
      for (int x = 0; x < X::kPoints; ++x) {
        store(call.points[y * kPoints + x] + target, points[x]);
      }
    }
  }

  template <class Y>
  static void gradient_row_of(const conv::GradientRowCall& call) {
    for (int v = 0; v < call.vectors; ++v) {
      const int channel = v * kLane;
      const int valid = std::clamp(call.channels - channel, 0, kLane);
      for_each_tile(call.columns, [&]<class X>(int tile, int column, X) {
        const ptrdiff_t target = (static_cast<ptrdiff_t>(tile) * call.vectors + v) * kLane;
        gradient_tile<Y, X>(call, channel, valid, call.gradient + column * call.pixel_stride,
                            target);
      });
    }
  }

  static void gradient_row(const conv::GradientRowCall& call) {
    call.big_row ? gradient_row_of<Big>(call) : gradient_row_of<Small>(call);
  }

  // --- weights: G w G^T and its adjoint ---------------------------------------------------------

  static void weights(const float* w, int vectors, float* u, ptrdiff_t point_stride) {
    for (int v = 0; v < vectors; ++v, w += kLane, u += kLane) {
      F32 half[kTaps][kPoints];
      for (int x = 0; x < kTaps; ++x) {
        F32 column[kTaps];
        for (int y = 0; y < kTaps; ++y) {
          column[y] = load(w + static_cast<ptrdiff_t>(y * kTaps + x) * vectors * kLane);
        }
        Big::weights(column, half[x]);
      }
#pragma GCC unroll 1
      for (int y = 0; y < kPoints; ++y) {
        F32 row[kTaps], points[kPoints];
        for (int x = 0; x < kTaps; ++x) row[x] = half[x][y];
        Big::weights(row, points);
        for (int x = 0; x < kPoints; ++x) store(u + (y * kPoints + x) * point_stride, points[x]);
      }
    }
  }

  static void weight_gradient(const float* u, ptrdiff_t point_stride, int vectors, float* w) {
    for (int v = 0; v < vectors; ++v, w += kLane, u += kLane) {
      F32 half[kPoints][kTaps];
      for (int y = 0; y < kPoints; ++y) {
        F32 row[kPoints];
        for (int x = 0; x < kPoints; ++x) row[x] = load(u + (y * kPoints + x) * point_stride);
        Big::weight_gradient(row, half[y]);
      }
      for (int x = 0; x < kTaps; ++x) {
        F32 column[kPoints], taps[kTaps];
        for (int y = 0; y < kPoints; ++y) column[y] = half[y][x];
        Big::weight_gradient(column, taps);
        for (int y = 0; y < kTaps; ++y) {
          store(w + static_cast<ptrdiff_t>(y * kTaps + x) * vectors * kLane, taps[y]);
        }
      }
    }
  }

  static constexpr conv::WinogradKernels table() {
    return {kTaps, kBig, kPoints, input_row, output_row, gradient_row, weights, weight_gradient};
  }
};

// One table per kernel size, each in a translation unit of its own.
const conv::WinogradKernels* winograd_2(int big);
const conv::WinogradKernels* winograd_3(int big);
const conv::WinogradKernels* winograd_4(int big);
const conv::WinogradKernels* winograd_5(int big);

}  // namespace fastalex::cpu::FASTALEX_ISA
