// The small kernels round a convolution: packing weights, masking gradients by ReLU, adding up
// split sums in order.
#pragma once

#include "conv_plan.h"
#include "pack.cuh"

namespace fastalex {

constexpr int kPartThreads = 256;

// packed[phase][group][row][depth]: weights in the order in which a convolution walks through
// depth, padded with zeros. Strides of the weight [groups * channels_out, channels_in, h, w] are
// image, channel, row, column.
struct PackPlan {
  const void* weight;
  void* packed;
  Strides stride;
  ConvAxis h, w;
  int transposed, window, channels_out, channels_in, groups, rows, tap_depth, depth_pitch, phases_w;
  long long total;
};

template <class T>
__global__ void __launch_bounds__(kPartThreads) pack_weight(const PackPlan p) {
  const long long index = static_cast<long long>(blockIdx.x) * kPartThreads + threadIdx.x;
  if (index >= p.total) return;
  const int depth = index % p.depth_pitch, row = index / p.depth_pitch % p.rows;
  const long long rest = index / p.depth_pitch / p.rows;
  const int group = rest % p.groups, phase = rest / p.groups;
  const int tap = depth / p.tap_depth, inside = depth % p.tap_depth;

  const PhaseTaps taps_h = phase_taps(p.h, p.transposed, phase / p.phases_w);
  const PhaseTaps taps_w = phase_taps(p.w, p.transposed, phase % p.phases_w);
  const int across = p.window ? 1 : taps_w.count;
  int r = 0, s = 0, out = 0, in = 0;
  bool real = across > 0 && tap < taps_h.count * across;
  if (real) {
    r = taps_h.first + tap / across * p.h.period, s = taps_w.first + tap % across * p.w.period;
    out = p.transposed ? inside : row, in = p.transposed ? row : inside;
    if (p.window) s = inside / p.channels_in, in = inside % p.channels_in, real = s < p.w.kernel;
    real = real && out < p.channels_out && in < p.channels_in;
  }
  float value[1] = {0.0f};
  if (real)
    load_values(static_cast<const T*>(p.weight) + (group * p.channels_out + out) * p.stride.image +
                    in * p.stride.channel + r * p.stride.row + s * p.stride.column,
                value);
  store_values(static_cast<T*>(p.packed) + index, value);
}

// dz = output <= 0 ? 0 : grad as [pixel][group][padded channels], zeros in the padding, and each
// block's share of the bias gradient: a thread walks down `pixels` pixels of one channel. A NaN
// output passes its gradient on, as in torch.
struct MaskPlan {
  const void *grad, *output;  // without an output, nothing is masked
  void* dz;
  float* bias_partial;  // [blocks of pixels][groups * padded channels]
  Strides grad_stride, output_stride;
  long long pixels;
  int width, height, groups, channels, padded, span;
  FastDivide by_width, by_height, by_channel_blocks, by_padded;
};

template <class T>
__global__ void __launch_bounds__(kPartThreads) mask_gradient(const MaskPlan p) {
  const int span_index = p.by_channel_blocks(blockIdx.x);
  const int column =
      (blockIdx.x - span_index * p.by_channel_blocks.divisor) * kPartThreads + threadIdx.x;
  const int columns = p.groups * p.padded;
  if (column >= columns) return;
  const int group = p.by_padded(column), inside = column - group * p.padded;
  const int channel = group * p.channels + inside;
  const long long first = static_cast<long long>(span_index) * p.span;
  const long long last = first + p.span < p.pixels ? first + p.span : p.pixels;
  float sum = 0.0f;
#pragma unroll 4
  for (long long pixel = first; pixel < last; pixel++) {
    const int line = p.by_width(static_cast<int>(pixel)), image = p.by_height(line);
    const int row = line - image * p.height, at = static_cast<int>(pixel) - line * p.width;
    float g[1] = {0.0f};
    if (inside < p.channels) {
      load_values(static_cast<const T*>(p.grad) + image * p.grad_stride.image +
                      channel * p.grad_stride.channel + row * p.grad_stride.row +
                      at * p.grad_stride.column,
                  g);
      float y[1] = {1.0f};
      if (p.output)
        load_values(static_cast<const T*>(p.output) + image * p.output_stride.image +
                        channel * p.output_stride.channel + row * p.output_stride.row +
                        at * p.output_stride.column,
                    y);
      if (y[0] <= 0.0f) g[0] = 0.0f;
    }
    store_values(static_cast<T*>(p.dz) + pixel * columns + column, g);
    sum += g[0];
  }
  if (p.bias_partial)
    store_global(p.bias_partial + static_cast<long long>(span_index) * columns + column, sum);
}

// grad_bias[c]: the shares of one channel, added by a block in a fixed order.
struct BiasPlan {
  const float* partial;
  void* grad_bias;
  int shares, channels, padded, groups;
};

template <class T>
__global__ void __launch_bounds__(kPartThreads) sum_bias(const BiasPlan p) {
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  const int group = blockIdx.x / p.channels, column = group * p.padded + blockIdx.x % p.channels;
  const long long pitch = static_cast<long long>(p.groups) * p.padded;
  float sum = 0.0f;
  for (int share = threadIdx.x; share < p.shares; share += kPartThreads)
    sum += load_global(p.partial + share * pitch + column);
  store_shared(sums + threadIdx.x, sum);
  for (int half = kPartThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half)
      store_shared(sums + threadIdx.x,
                   load_shared(sums + threadIdx.x) + load_shared(sums + threadIdx.x + half));
  }
  if (threadIdx.x == 0) {
    const float total[1] = {load_shared(sums)};
    store_values(static_cast<T*>(p.grad_bias) + blockIdx.x, total);
  }
}

// out = sum over splits, in order, then bias and ReLU where asked. `partial` is
// [split][outer][inner]; an inner index is (channel of a convolution's output) or (tap, channel) of
// a weight, and its place in `out` comes from the strides.
struct ReducePlan {
  const float* partial;
  const void* bias;
  void* out;
  long long outer, inner, split_pitch;
  int splits, relu;
  Strides stride;  // of `out`
  int height, width, kernel_w, channels_in, weight;
};

template <class T>
__global__ void __launch_bounds__(kPartThreads) reduce_splits(const ReducePlan p) {
  const long long index = static_cast<long long>(blockIdx.x) * kPartThreads + threadIdx.x;
  if (index >= p.outer * p.inner) return;
  const long long outer = index / p.inner;
  const int inner = static_cast<int>(index - outer * p.inner);
  float sum = 0.0f;
#pragma unroll 4
  for (int split = 0; split < p.splits; split++)
    sum += load_global(p.partial + split * p.split_pitch + index);
  if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[inner]);
  if (p.relu && sum < 0.0f) sum = 0.0f;
  const float value[1] = {sum};
  long long at;
  if (p.weight) {
    const int tap = inner / p.channels_in, channel = inner - tap * p.channels_in,
              r = tap / p.kernel_w;
    at = outer * p.stride.image + channel * p.stride.channel + r * p.stride.row +
         (tap - r * p.kernel_w) * p.stride.column;
  } else {
    const long long line = outer / p.width, image = line / p.height;
    at = image * p.stride.image + inner * p.stride.channel +
         (line - image * p.height) * p.stride.row + (outer - line * p.width) * p.stride.column;
  }
  store_values(static_cast<T*>(p.out) + at, value);
}

}  // namespace fastalex
