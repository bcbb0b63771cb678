// y = x * s^-beta, s_c = k + scale * (sum of x_j^2 over the window of c): 2 * N*C*H*W * sizeof(T)
// bytes, read once, written once.
#pragma once

#include "lrn_window.cuh"

namespace fastalex {

constexpr int kLrnThreads = 256;

struct LrnPlan {
  const void* x;  // [N, C, rows, columns]
  void* y;        // the same shape
  Strides x_stride, y_stride;
  LrnWindow window;
  int items;    // threads with work in one image
  int packs;    // packs of channels a pixel, or packs of pixels a plane
  int segment;  // channels a thread walks through when channels come first
  FastDivide by_blocks, by_packs, by_columns, by_segments;
};

struct ImageItem {
  long long image;
  int item;
  bool inside;
};
// Blocks are dealt to images in order: an image's index is 64-bit, everything inside it 32-bit.
__device__ __forceinline__ ImageItem image_item(const FastDivide& by_blocks, int items) {
  const int image = by_blocks(blockIdx.x), block = blockIdx.x - image * by_blocks.divisor;
  const int item = block * kLrnThreads + threadIdx.x;
  return {image, item, item < items};
}

// Channels side by side: a thread takes V channels of one pixel.
template <class T, int V, int Size>
__global__ void __launch_bounds__(kLrnThreads) lrn_channels_last(const LrnPlan p) {
  const ImageItem at = image_item(p.by_blocks, p.items);
  if (!at.inside) return;
  const int pixel = p.by_packs(at.item), channel = (at.item - pixel * p.packs) * V;
  const int row = p.by_columns(pixel),
            column = pixel - row * static_cast<int>(p.by_columns.divisor);
  const T* x = static_cast<const T*>(p.x) + at.image * p.x_stride.image + row * p.x_stride.row +
               column * p.x_stride.column;
  T* y = static_cast<T*>(p.y) + at.image * p.y_stride.image + row * p.y_stride.row +
         column * p.y_stride.column;
  float v[V], squares[V];
  channel_window_sums<T, V, Size>(p.window, x, 1, channel, v, squares);
#pragma unroll
  for (int i = 0; i < V; i++) v[i] *= inverse_power<Size>(p.window, lrn_sum(p.window, squares[i]));
  store_values(y + channel, v);
}

// Where a thread of a channels-first kernel works: V pixels of a row, and a run of channels inside
// one group.
struct ChannelWalk {
  int row, column;
  ChannelRange group, run;
};
template <int V>
__device__ __forceinline__ ChannelWalk channel_walk(const LrnWindow& w, int item, int packs,
                                                    int segment, const FastDivide& by_columns,
                                                    const FastDivide& by_packs,
                                                    const FastDivide& by_segments) {
  const int index = by_packs(item), pack = item - index * packs;
  const int row = by_columns(pack),
            column = (pack - row * static_cast<int>(by_columns.divisor)) * V;
  const int group = by_segments(index),
            part = index - group * static_cast<int>(by_segments.divisor);
  const ChannelRange range = {group * w.group_channels, (group + 1) * w.group_channels};
  const int begin = range.begin + part * segment;
  return {row, column, range, {begin, min(begin + segment, range.end)}};
}

// Pixels side by side: a thread takes V pixels and walks through channels with a running window.
template <class T, int V, int Size>
__global__ void __launch_bounds__(kLrnThreads) lrn_channels_first(const LrnPlan p) {
  const ImageItem at = image_item(p.by_blocks, p.items);
  if (!at.inside) return;
  const LrnWindow& w = p.window;
  const ChannelWalk walk =
      channel_walk<V>(w, at.item, p.packs, p.segment, p.by_columns, p.by_packs, p.by_segments);
  const T* x = static_cast<const T*>(p.x) + at.image * p.x_stride.image +
               walk.row * p.x_stride.row + walk.column * p.x_stride.column;
  T* y = static_cast<T*>(p.y) + at.image * p.y_stride.image + walk.row * p.y_stride.row +
         walk.column * p.y_stride.column;
  float out[V];
  if constexpr (Size != 0) {
    constexpr int kBefore = Size / 2, kAfter = Size - 1 - kBefore;
    RunningWindow<V, Size> window;
    window.clear();
    float newest[V];
    for (int c = walk.run.begin - kBefore; c < walk.run.begin + kAfter; c++) {
      load_in_group(x, p.x_stride.channel, c, walk.group, newest);
      window.push(newest);
    }
#pragma unroll 5
    for (int c = walk.run.begin; c < walk.run.end; c++) {
      load_in_group(x, p.x_stride.channel, c + kAfter, walk.group, newest);
      window.push(newest);
#pragma unroll
      for (int i = 0; i < V; i++)
        out[i] = window.x[kBefore][i] * inverse_power<Size>(w, lrn_sum(w, window.squares(i)));
      store_values(y + c * p.y_stride.channel, out);
    }
  } else {
    for (int c = walk.run.begin; c < walk.run.end; c++) {
      float squares[V];
      pixel_window_sums<T, V>(w, x, p.x_stride.channel, c, out, squares);
#pragma unroll
      for (int i = 0; i < V; i++) out[i] *= inverse_power<Size>(w, lrn_sum(w, squares[i]));
      store_values(y + c * p.y_stride.channel, out);
    }
  }
}

}  // namespace fastalex
