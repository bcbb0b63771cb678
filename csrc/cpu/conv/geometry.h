// What the engines compute: one stride-, group- and phase-resolved convolution and its weights.
#pragma once
#include <cstdint>

#include "conv.h"

namespace fastalex::cpu::conv {

// A convolution over an input that is zero outside its bounds; channels and filters are per group.
//   out[y][x] = sum over taps of in[y * stride - offset + ky * dilation][...] * w[ky][kx]
struct Geometry {
  int64_t images = 0;
  int groups = 1, channels = 0, filters = 0;
  int height = 0, width = 0, out_height = 0, out_width = 0;
  int kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, dilation_h = 1, dilation_w = 1;
  int offset_h = 0, offset_w = 0;

  int terms() const { return channels * kernel_h * kernel_w; }
  double flops() const {
    return 2.0 * images * groups * filters * terms() * out_height * out_width;
  }
};

// Taps of one dimension: tap j of the engine is tap first + j * step of the caller.
struct TapRange {
  int first = 0, step = 1, count = 1;
};

// Where the engine's weight (group, filter, channel, ky, kx) lies in the caller's tensor.
// Input gradients read it transposed and flipped, one output phase at a time. Under fold s (space
// to depth) channel = (dy * s + dx) * channels + c and tap = ky * s + dy.
struct WeightMap {
  bool transposed = false;
  TapRange rows, columns;
  int fold = 1;
  int group_filters = 0, group_channels = 0;  // the caller's, per group

  // Element offset, or -1 where the folded kernel is padded with zeros.
  int64_t offset(const Strides& strides, int group, int filter, int channel, int ky, int kx) const {
    int64_t n = filter, c = channel;
    int y = ky, x = kx;
    if (transposed) {
      n = channel;
      c = filter;
    } else if (fold > 1) {
      const int position = channel / group_channels;
      c = channel % group_channels;
      y = ky * fold + position / fold;
      x = kx * fold + position % fold;
    }
    if (y >= rows.count || x >= columns.count) return -1;
    n += static_cast<int64_t>(group) * group_filters;
    return n * strides.n + c * strides.c + (rows.first + y * rows.step) * strides.h +
           (columns.first + x * columns.step) * strides.w;
  }
};

// One phase of the output in the caller's tensor: every `step`-th pixel from `first`.
struct Phase {
  int first_h = 0, first_w = 0, step_h = 1, step_w = 1;
};

}  // namespace fastalex::cpu::conv
