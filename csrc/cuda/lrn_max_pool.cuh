// y = max_pool(lrn(x)): x is read once, the normalised values live in shared memory alone, rounded
// to T before they are compared, so that the result equals the two operators in turn bit for bit.
// Bytes: x read, y and one byte an output written.
#pragma once

#include "lrn.cuh"
#include "pool_window.cuh"

namespace fastalex {

constexpr int kFusedThreads = 256;
constexpr int kFusedSlots = 4;  // pixels of the input tile a thread owns when channels come first

struct LrnMaxPoolPlan {
  const void* x;
  void *y, *offsets;
  Strides x_stride, y_stride, offsets_stride;
  LrnWindow lrn;
  PoolWindow pool;
  int wide_offsets;
  int tile_h, tile_w;    // outputs of one block
  int input_h, input_w;  // inputs under them; channels last: input_h is the depth of the ring, the
                         // window's height
  int packs;             // packs of channels a pixel (channels last)
  int segment;           // channels of one block (channels first)
  FastDivide by_tiles_w, by_tiles_h, by_packs, by_input_w, by_tile_w, by_segments, by_parts,
      by_ring;
};

struct FusedTile {
  long long image;
  int top, left,
      index;  // the first output row and column; index: what is left of the block's number
};
__device__ __forceinline__ FusedTile fused_tile(const LrnMaxPoolPlan& p, int block) {
  const int line = p.by_tiles_w(block), rest = p.by_tiles_h(line);
  return {0, (line - rest * static_cast<int>(p.by_tiles_h.divisor)) * p.tile_h,
          (block - line * static_cast<int>(p.by_tiles_w.divisor)) * p.tile_w, rest};
}

template <int Kernel, class T, int V, bool Save, class Load>
__device__ __forceinline__ void pool_one(const LrnMaxPoolPlan& p, long long image, int channel,
                                         int oh, int ow, Load load) {
  const PoolAxis &h = p.pool.h, &w = p.pool.w;
  const int top = oh * h.stride - h.padding, left = ow * w.stride - w.padding;
  Winners<V, Save> best(first_position(p.pool, top, left));
#pragma unroll(Kernel ? Kernel : 1)
  for (int r = 0; r < (Kernel ? Kernel : h.kernel); r++)
#pragma unroll(Kernel ? Kernel : 1)
    for (int s = 0; s < (Kernel ? Kernel : w.kernel); s++) {
      const int row = top + r, column = left + s;
      if (row < 0 || row >= h.size || column < 0 || column >= w.size) continue;
      float v[V];
      load(row, column, v);
      best.take(v, r * w.kernel + s);
    }
  const Strides &ys = p.y_stride, &os = p.offsets_stride;
  store_values(
      static_cast<T*>(p.y) + image * ys.image + channel * ys.channel + oh * ys.row + ow * ys.column,
      best.value);
  if constexpr (Save)
    store_positions(p.offsets, p.wide_offsets,
                    image * os.image + channel * os.channel + oh * os.row + ow * os.column,
                    best.position);
}

// Channels side by side. A ring of window-height normalised rows moves down the image, one output
// row at a time.
template <class T, int V, int Size, int Kernel, bool Save>
struct NormalisedRing {
  const LrnMaxPoolPlan& p;
  const T* x;  // this image
  T* ring;
  int left;  // input column of the ring's first

  __device__ __forceinline__ T* slot(int row, int column) const {
    const int at = (row - p.by_ring(row) * p.input_h) * p.input_w + column - left;
    return ring + at * p.packs * V;
  }
  __device__ __forceinline__ void normalise(int first_row, int rows) const {
    const int total = rows * p.input_w * p.packs;
#pragma unroll 2
    for (int item = threadIdx.x; item < total; item += kFusedThreads) {
      const int pixel = p.by_packs(item), channel = (item - pixel * p.packs) * V;
      const int line = p.by_input_w(pixel), row = first_row + line,
                column = left + pixel - line * p.input_w;
      if (row < 0 || row >= p.pool.h.size || column < 0 || column >= p.pool.w.size) continue;
      float v[V], squares[V];
      channel_window_sums<T, V, Size>(p.lrn, x + row * p.x_stride.row + column * p.x_stride.column,
                                      1, channel, v, squares);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] *= inverse_power<Size>(p.lrn, lrn_sum(p.lrn, squares[i]));
      store_shared_values(slot(row, column) + channel, v);
    }
  }
  __device__ __forceinline__ void pool(const FusedTile& tile, int oh) const {
    for (int item = threadIdx.x; item < p.tile_w * p.packs; item += kFusedThreads) {
      const int place = p.by_packs(item), channel = (item - place * p.packs) * V,
                ow = tile.left + place;
      if (ow >= p.pool.w.out) continue;
      pool_one<Kernel, T, V, Save>(p, tile.image, channel, oh, ow,
                                   [&](int row, int column, float (&v)[V]) {
                                     load_shared_values(slot(row, column) + channel, v);
                                   });
    }
  }
};

// Kernel 3 unrolls a 3x3 window, 0 takes any.
template <class T, int V, int Size, int Kernel, bool Save>
__global__ void __launch_bounds__(kFusedThreads, 4)
    lrn_max_pool_channels_last(const LrnMaxPoolPlan p) {
  FusedTile tile = fused_tile(p, blockIdx.x);
  tile.image = tile.index;
  const PoolAxis& h = p.pool.h;
  const NormalisedRing<T, V, Size, Kernel, Save> rows = {
      p, static_cast<const T*>(p.x) + tile.image * p.x_stride.image,
      reinterpret_cast<T*>(dynamic_shared()), tile.left * p.pool.w.stride - p.pool.w.padding};
  const int end = min(tile.top + p.tile_h, h.out);
  for (int oh = tile.top; oh < end; oh++) {
    const int fresh = oh == tile.top ? h.kernel : min(h.stride, h.kernel);
    rows.normalise(oh * h.stride - h.padding + h.kernel - fresh, fresh);
    __syncthreads();
    rows.pool(tile, oh);
    __syncthreads();
  }
}

// Pixels side by side. A block owns a tile of the plane and walks through channels; each channel's
// normalised tile passes through one of two shared buffers, so that one barrier a channel is
// enough.
template <class T, int Size, int Kernel, bool Save>
__global__ void __launch_bounds__(kFusedThreads, 4)
    lrn_max_pool_channels_first(const LrnMaxPoolPlan p) {
  FusedTile tile = fused_tile(p, blockIdx.x);
  const int part = p.by_parts(tile.index);  // (image, group), then the segment of the group
  const int segment = tile.index - part * static_cast<int>(p.by_parts.divisor);
  const int image = p.by_segments(part),
            group_index = part - image * static_cast<int>(p.by_segments.divisor);
  tile.image = image;
  const ChannelRange group = {group_index * p.lrn.group_channels,
                              (group_index + 1) * p.lrn.group_channels};
  const int begin = group.begin + segment * p.segment, end = min(begin + p.segment, group.end);
  const int top = tile.top * p.pool.h.stride - p.pool.h.padding,
            left = tile.left * p.pool.w.stride - p.pool.w.padding;
  const int pixels = p.input_h * p.input_w;
  constexpr int kBefore = Size / 2, kAfter = Size ? Size - 1 - kBefore : 0;

  const T* x[kFusedSlots];
  bool inside[kFusedSlots];
  RunningWindow<1, Size ? Size : 1> window[kFusedSlots];
#pragma unroll
  for (int s = 0; s < kFusedSlots; s++) {
    const int index = threadIdx.x + s * kFusedThreads, line = p.by_input_w(index);
    const int row = top + line, column = left + index - line * p.input_w;
    inside[s] =
        index < pixels && row >= 0 && row < p.pool.h.size && column >= 0 && column < p.pool.w.size;
    x[s] = static_cast<const T*>(p.x) + tile.image * p.x_stride.image + row * p.x_stride.row +
           column * p.x_stride.column;
    window[s].clear();
    if constexpr (Size != 0) {
      for (int c = begin - kBefore; c < begin + kAfter; c++) {
        float newest[1] = {};
        if (inside[s]) load_in_group(x[s], p.x_stride.channel, c, group, newest);
        window[s].push(newest);
      }
    }
  }

  T* buffers = reinterpret_cast<T*>(dynamic_shared());
  for (int c = begin; c < end; c++) {
    T* buffer = buffers + (c & 1) * pixels;
    float newest[kFusedSlots][1] = {};
    if constexpr (Size != 0) {
#pragma unroll
      for (int s = 0; s < kFusedSlots; s++)
        if (inside[s]) load_in_group(x[s], p.x_stride.channel, c + kAfter, group, newest[s]);
    }
#pragma unroll
    for (int s = 0; s < kFusedSlots; s++) {
      float v[1], squares[1];
      if constexpr (Size != 0) {
        window[s].push(newest[s]);
        v[0] = window[s].x[kBefore][0], squares[0] = window[s].squares(0);
      } else if (inside[s]) {
        pixel_window_sums<T, 1>(p.lrn, x[s], p.x_stride.channel, c, v, squares);
      }
      if (!inside[s]) continue;
      v[0] *= inverse_power<Size>(p.lrn, lrn_sum(p.lrn, squares[0]));
      store_shared_values(buffer + threadIdx.x + s * kFusedThreads, v);
    }
    __syncthreads();
    for (int item = threadIdx.x; item < p.tile_h * p.tile_w; item += kFusedThreads) {
      const int line = p.by_tile_w(item), oh = tile.top + line,
                ow = tile.left + item - line * p.tile_w;
      if (oh >= p.pool.h.out || ow >= p.pool.w.out) continue;
      pool_one<Kernel, T, 1, Save>(
          p, tile.image, c, oh, ow, [&](int row, int column, float (&out)[1]) {
            load_shared_values(buffer + (row - top) * p.input_w + column - left, out);
          });
    }
  }
}

}  // namespace fastalex
