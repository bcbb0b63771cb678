// How tiles of image and weight reach shared memory: asynchronous 16- or 8-byte copies, or a gather
// of single values.
#pragma once

#include "conv_tile.cuh"

namespace fastalex {

// Image values side by side in depth: channels of a pixel.
template <class T, class Tile, int Bytes>
struct PixelCopier {
  static constexpr bool kAsynchronous = true;
  static constexpr int Values = Bytes / sizeof(T), Chunks = kRowBytes / Bytes;
  static constexpr int RowsPerPass = Tile::Threads / Chunks, Passes = Tile::BlockM / RowsPerPass;
  static_assert(Tile::BlockM % RowsPerPass == 0 && RowsPerPass % 8 == 0,
                "passes must keep the swizzle phase");
  const T* origin[Passes];
  int row[Passes], column[Passes];
  int offset, depth;

  __device__ __forceinline__ PixelCopier(const ConvPlan& p, const ConvBlock& b) {
    const int chunk = threadIdx.x % Chunks, tile_row = threadIdx.x / Chunks;
    depth = chunk * Values;
    offset = swizzled(tile_row, chunk * Bytes / 16 * 16) + chunk * Bytes % 16;
#pragma unroll
    for (int i = 0; i < Passes; i++) {
      const ConvPixel at = conv_pixel(p, b, b.first_row + tile_row + i * RowsPerPass);
      row[i] = at.i * (p.transposed ? 1 : p.h.stride);
      column[i] = at.j * (p.transposed ? 1 : p.w.stride);
      origin[i] = static_cast<const T*>(p.x) + at.image * p.x_stride.image +
                  row[i] * p.x_stride.row + column[i] * p.x_stride.column +
                  b.group * p.channels_in * p.x_stride.channel;
      if (!at.inside) row[i] = kNowhere;
    }
  }
  __device__ __forceinline__ void issue(const ConvPlan& p, const Tap* taps, char* stage,
                                        int k) const {
    const int tap_index = p.by_tap_depth(k + depth), inside = k + depth - tap_index * p.tap_depth;
    const Tap tap = load_tap(taps + tap_index);
    const long long along = tap.offset + inside;
    const SharedAddress destination = shared_address(stage) + offset;
#pragma unroll
    for (int i = 0; i < Passes; i++) {
      const bool valid =
          static_cast<unsigned>(row[i] + tap.row) < static_cast<unsigned>(p.h.in) &&
          static_cast<unsigned>(column[i] + tap.column) < static_cast<unsigned>(p.w.in);
      cp_async<Bytes>(destination + i * RowsPerPass * kRowBytes, origin[i] + along,
                      valid ? Bytes : 0);
    }
  }
};

// Windows of filter rows, for images of few channels: kernel * channels values side by side. The
// copy that ends a window reads only what belongs to it, so that a neighbour's inf or NaN never
// meets a zero weight.
template <class T, class Tile, int Bytes>
struct WindowCopier {
  static constexpr bool kAsynchronous = true;
  static constexpr int Values = Bytes / sizeof(T), Chunks = kRowBytes / Bytes;
  static constexpr int RowsPerPass = Tile::Threads / Chunks, Passes = Tile::BlockM / RowsPerPass;
  static_assert(Tile::BlockM % RowsPerPass == 0 && RowsPerPass % 8 == 0,
                "passes must keep the swizzle phase");
  const T* origin[Passes];
  int row[Passes], column[Passes];  // column in values
  int offset, depth;

  __device__ __forceinline__ WindowCopier(const ConvPlan& p, const ConvBlock& b) {
    const int chunk = threadIdx.x % Chunks, tile_row = threadIdx.x / Chunks;
    depth = chunk * Values;
    offset = swizzled(tile_row, chunk * Bytes / 16 * 16) + chunk * Bytes % 16;
#pragma unroll
    for (int i = 0; i < Passes; i++) {
      const ConvPixel at = conv_pixel(p, b, b.first_row + tile_row + i * RowsPerPass);
      row[i] = at.i * p.h.stride;
      column[i] = (at.j * p.w.stride - p.w.padding) * p.channels_in;
      origin[i] = static_cast<const T*>(p.x) + at.image * p.x_stride.image +
                  row[i] * p.x_stride.row + column[i];
      if (!at.inside) row[i] = kNowhere;
    }
  }
  __device__ __forceinline__ void issue(const ConvPlan& p, const Tap* taps, char* stage,
                                        int k) const {
    const int tap_index = p.by_tap_depth(k + depth), inside = k + depth - tap_index * p.tap_depth;
    const Tap tap = load_tap(taps + tap_index);
    const int bytes = min(Bytes, (p.window_values - inside) * static_cast<int>(sizeof(T)));
    const long long along = tap.row * p.x_stride.row + inside;
    const SharedAddress destination = shared_address(stage) + offset;
#pragma unroll
    for (int i = 0; i < Passes; i++) {
      const bool valid =
          static_cast<unsigned>(row[i] + tap.row) < static_cast<unsigned>(p.h.in) &&
          static_cast<unsigned>(column[i] + inside) < static_cast<unsigned>(p.w.in * p.channels_in);
      cp_async<Bytes>(destination + i * RowsPerPass * kRowBytes, origin[i] + along,
                      valid ? max(bytes, 0) : 0);
    }
  }
};

// Any strides, any alignment, any number of channels: single loads, neighbouring lanes on
// neighbouring pixels.
template <class T, class Tile, int>
struct GatherCopier {
  static constexpr bool kAsynchronous = false;
  static constexpr int Values = 16 / sizeof(T), Chunks = kRowBytes / 16;
  static constexpr int Passes = Tile::BlockM * Chunks / Tile::Threads;
  static_assert(Tile::Threads % Tile::BlockM == 0 || Tile::BlockM % Tile::Threads == 0,
                "a thread keeps its pixels");
  static constexpr int Pixels = Tile::BlockM > Tile::Threads ? Tile::BlockM / Tile::Threads : 1;
  const T* origin[Pixels];
  int row[Pixels], column[Pixels];

  __device__ __forceinline__ GatherCopier(const ConvPlan& p, const ConvBlock& b) {
#pragma unroll
    for (int i = 0; i < Pixels; i++) {
      const ConvPixel at =
          conv_pixel(p, b, b.first_row + (threadIdx.x + i * Tile::Threads) % Tile::BlockM);
      row[i] = at.i * (p.transposed ? 1 : p.h.stride);
      column[i] = at.j * (p.transposed ? 1 : p.w.stride);
      origin[i] = static_cast<const T*>(p.x) + at.image * p.x_stride.image +
                  row[i] * p.x_stride.row + column[i] * p.x_stride.column +
                  b.group * p.channels_in * p.x_stride.channel;
      if (!at.inside) row[i] = kNowhere;
    }
  }
  __device__ __forceinline__ void issue(const ConvPlan& p, const Tap* taps, char* stage,
                                        int k) const {
#pragma unroll
    for (int i = 0; i < Passes; i++) {
      const int index = threadIdx.x + i * Tile::Threads, tile_row = index % Tile::BlockM,
                chunk = index / Tile::BlockM;
      const int pixel = i % Pixels;
      Pack<T, Values> pack;
#pragma unroll
      for (int e = 0; e < Values; e++) {
        const int depth = k + chunk * Values + e;
        const int tap_index = p.by_tap_depth(depth), channel = depth - tap_index * p.tap_depth;
        const Tap tap = load_tap(taps + tap_index);
        const bool valid =
            static_cast<unsigned>(row[pixel] + tap.row) < static_cast<unsigned>(p.h.in) &&
            static_cast<unsigned>(column[pixel] + tap.column) < static_cast<unsigned>(p.w.in);
        pack.value[e] = from_float<T>(0.0f);
        if (valid) {
          Pack<T, 1> one;
          one.word = load_global(reinterpret_cast<const typename Pack<T, 1>::Word*>(
              origin[pixel] + tap.offset + channel * p.x_stride.channel));
          pack.value[e] = one.value[0];
        }
      }
      store_shared(reinterpret_cast<uint4*>(stage + swizzled(tile_row, chunk * 16)), pack.word);
    }
  }
};

// Weights are packed, so that 16-byte copies always serve them.
template <class T, class Tile>
struct WeightCopier {
  static constexpr int Values = 16 / sizeof(T), Chunks = kRowBytes / 16;
  static constexpr int RowsPerPass = Tile::Threads / Chunks, Passes = Tile::BlockN / RowsPerPass;
  static_assert(Tile::BlockN % RowsPerPass == 0 && RowsPerPass % 8 == 0,
                "passes must keep the swizzle phase");
  const T* origin;
  int rows_left, depth, offset;

  __device__ __forceinline__ WeightCopier(const ConvPlan& p, const ConvBlock& b) {
    const int chunk = threadIdx.x % Chunks, tile_row = threadIdx.x / Chunks;
    depth = chunk * Values;
    offset = Tile::InputBytes + swizzled(tile_row, chunk * 16);
    rows_left = p.channels_out - b.first_column - tile_row;
    const long long first =
        static_cast<long long>(b.phase * p.groups + b.group) * p.channels_out + b.first_column;
    origin = static_cast<const T*>(p.weight) + (first + tile_row) * p.depth_pitch + depth;
  }
  __device__ __forceinline__ void issue(const ConvPlan& p, char* stage, int k) const {
    const SharedAddress destination = shared_address(stage) + offset;
#pragma unroll
    for (int i = 0; i < Passes; i++) {
      const bool valid = k + depth < p.depth_pitch && i * RowsPerPass < rows_left;
      cp_async<16>(destination + i * RowsPerPass * kRowBytes,
                   origin + k + static_cast<long long>(i * RowsPerPass) * p.depth_pitch,
                   valid ? 16 : 0);
    }
  }
};

}  // namespace fastalex
