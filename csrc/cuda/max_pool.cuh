// Max-pooling with torch's semantics. Bytes: x read once (overlaps come from L1), y and one byte an
// output written.
#pragma once

#include "pool_window.cuh"

namespace fastalex {

constexpr int kPoolThreads = 256;

struct MaxPoolPlan {
  const void* x;  // [N, C, H, W]
  void* y;        // [N, C, out_h, out_w]
  void* offsets;  // like y, or null
  Strides x_stride, y_stride, offsets_stride;
  PoolWindow window;
  int wide_offsets, channels_last;
  int items;  // threads with work in one image
  int packs;  // packs of channels a pixel
  int band;   // output rows a thread walks down: their windows overlap in L1
  FastDivide by_blocks, by_packs, by_out_w, by_bands;
};

struct PoolPlace {
  long long image;
  int band, column, channel;
  bool inside;
};
// Lanes run along the dense axis: packs of channels, or columns.
template <int V>
__device__ __forceinline__ PoolPlace pool_place(const MaxPoolPlan& p) {
  const int image = p.by_blocks(blockIdx.x), block = blockIdx.x - image * p.by_blocks.divisor;
  const int item = block * kPoolThreads + threadIdx.x;
  if (V > 1 || p.channels_last) {
    const int place = p.by_packs(item), channel = (item - place * p.packs) * V;
    const int band = p.by_out_w(place);
    return {image, band, place - band * static_cast<int>(p.by_out_w.divisor), channel,
            item < p.items};
  }
  const int line = p.by_out_w(item), channel = p.by_bands(line);
  return {image, line - channel * static_cast<int>(p.by_bands.divisor),
          item - line * static_cast<int>(p.by_out_w.divisor), channel, item < p.items};
}

// Kernel: 3 unrolls a 3x3 window, so that its nine loads are in flight together; 0 takes any
// window.
template <class T, int V, bool Save, int Kernel>
__global__ void __launch_bounds__(kPoolThreads) max_pool(const MaxPoolPlan p) {
  const PoolPlace at = pool_place<V>(p);
  if (!at.inside) return;
  const PoolAxis &h = p.window.h, &w = p.window.w;
  const T* x =
      static_cast<const T*>(p.x) + at.image * p.x_stride.image + at.channel * p.x_stride.channel;
  const int left = at.column * w.stride - w.padding;
  const int end = min((at.band + 1) * p.band, h.out);
  for (int oh = at.band * p.band; oh < end; oh++) {
    const int top = oh * h.stride - h.padding;
    Winners<V, Save> best(first_position(p.window, top, left));
#pragma unroll(Kernel ? Kernel : 1)
    for (int r = 0; r < (Kernel ? Kernel : h.kernel); r++)
#pragma unroll(Kernel ? Kernel : 1)
      for (int s = 0; s < (Kernel ? Kernel : w.kernel); s++) {
        const int row = top + r * h.dilation, column = left + s * w.dilation;
        float v[V];
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = -kInfinity;
        if (row >= 0 && row < h.size && column >= 0 && column < w.size)
          load_values(x + row * p.x_stride.row + column * p.x_stride.column, v);
        best.take(v, r * w.kernel + s);
      }
    store_values(static_cast<T*>(p.y) + at.image * p.y_stride.image +
                     at.channel * p.y_stride.channel + oh * p.y_stride.row +
                     at.column * p.y_stride.column,
                 best.value);
    if constexpr (Save) {
      const Strides& s = p.offsets_stride;
      store_positions(
          p.offsets, p.wide_offsets,
          at.image * s.image + at.channel * s.channel + oh * s.row + at.column * s.column,
          best.position);
    }
  }
}

// gx: each input gathers the gradients of the windows it won. The plan's y is gx, its "outputs" are
// the inputs.
struct MaxPoolBackwardPlan {
  MaxPoolPlan place;
  PoolGradient gradient;
};

template <class T, int V, int Reach>
__global__ void __launch_bounds__(kPoolThreads) max_pool_backward(const MaxPoolBackwardPlan p) {
  const PoolPlace at = pool_place<V>(p.place);
  if (!at.inside) return;
  const Strides& s = p.place.y_stride;
  T* y = static_cast<T*>(p.place.y) + at.image * s.image + at.channel * s.channel +
         at.column * s.column;
  const int end = min((at.band + 1) * p.place.band, p.gradient.window.h.size);
  for (int row = at.band * p.place.band; row < end; row++) {
    float sum[V];
    gather_pool_gradient<T, V, Reach>(p.gradient, at.image, row, at.column, at.channel, sum);
    store_values(y + row * s.row, sum);
  }
}

}  // namespace fastalex
