// Max-pooling windows: torch's rule for the winner, and the gather that sends a gradient back to
// it.
#pragma once

#include "pack.cuh"
#include "view.h"

namespace fastalex {

struct PoolAxis {
  int size, out, kernel, stride, padding, dilation;
  FastDivide by_stride, by_dilation;
};
struct PoolWindow {
  PoolAxis h, w;
};

// The maxima of V windows and the positions of their winners. A NaN always replaces, a larger value
// replaces, an equal one does not. Padding is -inf, and `first` is the first position inside the
// input: it keeps a window of -inf.
template <int V, bool Save>
struct Winners {
  float value[V];
  int position[V];

  __device__ __forceinline__ explicit Winners(int first) {
#pragma unroll
    for (int i = 0; i < V; i++) value[i] = -kInfinity, position[i] = first;
  }
  __device__ __forceinline__ void take(const float (&v)[V], int at) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (v[i] > value[i] || v[i] != v[i]) {
        value[i] = v[i];
        if constexpr (Save) position[i] = at;
      }
    }
  }
};

// The first position of a window that lies inside the input; 0 for a window that dilation carries
// over a small input.
__device__ __forceinline__ int first_tap(const PoolAxis& a, int start) {
  return start >= 0 ? 0 : a.by_dilation(a.dilation - 1 - start);
}
__device__ __forceinline__ int first_position(const PoolWindow& p, int top, int left) {
  const int r = first_tap(p.h, top), s = first_tap(p.w, left);
  const bool inside = r < p.h.kernel && top + r * p.h.dilation < p.h.size && s < p.w.kernel &&
                      left + s * p.w.dilation < p.w.size;
  return inside ? r * p.w.kernel + s : 0;
}

template <int V>
__device__ __forceinline__ void store_positions(void* offsets, bool wide, long long index,
                                                const int (&position)[V]) {
  if constexpr (V == 1) {
    if (wide) {
      store_global(static_cast<unsigned*>(offsets) + index, static_cast<unsigned>(position[0]));
      return;
    }
  }
  Pack<unsigned char, V> pack;
#pragma unroll
  for (int i = 0; i < V; i++) pack.value[i] = static_cast<unsigned char>(position[i]);
  store_global(reinterpret_cast<typename Pack<unsigned char, V>::Word*>(
                   static_cast<unsigned char*>(offsets) + index),
               pack.word);
}
template <int V>
__device__ __forceinline__ void load_positions(const void* offsets, bool wide, long long index,
                                               int (&position)[V]) {
  if constexpr (V == 1) {
    if (wide) {
      position[0] = static_cast<int>(load_global(static_cast<const unsigned*>(offsets) + index));
      return;
    }
  }
  Pack<unsigned char, V> pack;
  pack.word = load_global(reinterpret_cast<const typename Pack<unsigned char, V>::Word*>(
      static_cast<const unsigned char*>(offsets) + index));
#pragma unroll
  for (int i = 0; i < V; i++) position[i] = pack.value[i];
}

// What flows into a pooling layer from behind: one value and one winner's position per output.
struct PoolGradient {
  const void* grad;     // [N, C, out_h, out_w]
  const void* offsets;  // the same shape; uint8, or int32 when wide
  Strides grad_stride, offsets_stride;
  PoolWindow window;
  int wide_offsets;
};

// Outputs along one axis whose windows may hold input position `at`.
struct OutputRange {
  int first, last, origin;  // origin: input position + padding
};
__device__ __forceinline__ OutputRange outputs_over(const PoolAxis& a, int at) {
  const int origin = at + a.padding, overhang = origin - a.dilation * (a.kernel - 1);
  const int first = overhang <= 0 ? 0 : a.by_stride(overhang + a.stride - 1);
  return {first, min(a.by_stride(origin), a.out - 1), origin};
}
// Which tap of output `out`'s window lies there, or -1: dilation may step over it.
__device__ __forceinline__ int tap_of(const PoolAxis& a, const OutputRange& range, int out) {
  const int distance = range.origin - out * a.stride;
  if (a.dilation == 1) return distance;
  const int tap = a.by_dilation(distance);
  return tap * a.dilation == distance ? tap : -1;
}

// Sum of the gradients of all windows won by input (row, column), in a fixed order.
// Reach: at most that many windows an axis, all loaded at once; 0: any number.
template <class T, int V, int Reach>
__device__ __forceinline__ void gather_pool_gradient(const PoolGradient& p, long long image,
                                                     int row, int column, int channel,
                                                     float (&sum)[V]) {
  const OutputRange rows = outputs_over(p.window.h, row),
                    columns = outputs_over(p.window.w, column);
  const T* grad =
      static_cast<const T*>(p.grad) + image * p.grad_stride.image + channel * p.grad_stride.channel;
  const long long offsets = image * p.offsets_stride.image + channel * p.offsets_stride.channel;
#pragma unroll
  for (int i = 0; i < V; i++) sum[i] = 0.0f;
#pragma unroll(Reach ? Reach : 1)
  for (int a = 0; a < (Reach ? Reach : rows.last - rows.first + 1); a++) {
#pragma unroll(Reach ? Reach : 1)
    for (int b = 0; b < (Reach ? Reach : columns.last - columns.first + 1); b++) {
      const int oh = rows.first + a, ow = columns.first + b;
      if (oh > rows.last || ow > columns.last) continue;
      const int tap_h = tap_of(p.window.h, rows, oh), tap_w = tap_of(p.window.w, columns, ow);
      if (tap_h < 0 || tap_w < 0) continue;
      float g[V];
      int position[V];
      load_values(grad + oh * p.grad_stride.row + ow * p.grad_stride.column, g);
      load_positions(p.offsets, p.wide_offsets,
                     offsets + oh * p.offsets_stride.row + ow * p.offsets_stride.column, position);
#pragma unroll
      for (int i = 0; i < V; i++)
        if (position[i] == tap_h * p.window.w.kernel + tap_w) sum[i] += g[i];
    }
  }
}

}  // namespace fastalex
