// What a convolution looks like to its kernels: a matrix product whose left side is gathered from
// an image by taps.
#pragma once

#include "view.h"

namespace fastalex {

// One spatial axis. Forward: output o takes input o * stride - padding + tap * dilation. Transposed
// (the gradient of the input): output o takes input (o + padding - tap * dilation) / stride where
// that is whole, so outputs of one phase o % stride use the same taps, `period` apart.
struct ConvAxis {
  int in, out, kernel, stride, padding, dilation, period;
};

// Rows: output pixels of one phase. Columns: output channels of one group. Depth: taps x input
// channels of the group.
struct ConvPlan {
  const void* x;       // [N, groups * channels_in, h.in, w.in]
  const void* weight;  // packed: [phase][group][channels_out][depth_pitch]
  const void* bias;    // [groups * channels_out], or null
  void* y;             // [N, groups * channels_out, h.out, w.out]
  float*
      partial;  // [split][N * h.out * w.out][groups * channels_out] when depth is split, else null
  Strides x_stride, y_stride;
  ConvAxis h, w;
  int images, groups, channels_in, channels_out;
  int transposed, relu;
  int tap_depth;      // depth of one tap: channels_in, or a padded window of kernel * channels_in
                      // values
  int window_values;  // by window: values of a filter row that count; else 0
  int depth_pitch, splits;
  int packed_store;  // y takes 16-byte stores along channels
  FastDivide by_columns, by_groups, by_rows, by_phases,
      by_phases_w;  // a block's number, fastest first
  FastDivide by_tap_depth, by_channels_in;
};

// The gradient of the weight: rows are output channels, columns are taps x input channels, depth is
// pixels.
struct ConvWeightPlan {
  const void* x;   // [N, groups * channels_in, h.in, w.in]
  const void* dz;  // [N * h.out * w.out][groups][padded channels_out]
  float* partial;  // [split][groups * channels_out][columns]
  Strides x_stride;
  ConvAxis h, w;
  int pixels, groups, channels_in, channels_out, dz_pitch, dz_group;
  int columns, split_pixels;
  FastDivide by_column_tiles, by_row_tiles, by_groups, by_out_w, by_out_h, by_channels_in,
      by_kernel_w;
};

// The taps that serve one phase of an axis: first, first + period, ...
struct PhaseTaps {
  int first, count;
};

#ifdef __CUDACC__
__host__ __device__
#endif
    inline PhaseTaps phase_taps(const ConvAxis& a, bool transposed, int phase) {
  if (!transposed) return {0, a.kernel};
  for (int tap = 0; tap < a.period && tap < a.kernel; tap++)
    if ((phase + a.padding - tap * a.dilation) % a.stride == 0)
      return {tap, (a.kernel - 1 - tap) / a.period + 1};
  return {0, 0};
}

// Input position of a tap relative to step * (the output's index in its phase).
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int tap_position(const ConvAxis& a, bool transposed, int phase, int tap) {
  return transposed ? (phase + a.padding - tap * a.dilation) / a.stride
                    : tap * a.dilation - a.padding;
}

}  // namespace fastalex
