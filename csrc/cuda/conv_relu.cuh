// y = relu(conv(x, weight) + bias) and, transposed, the gradient of x: implicit GEMM, 2 * pixels *
// channels_out * depth FLOP. A ring of shared stages is filled by asynchronous copies Stages - 1
// ahead of the multiplication.
#pragma once

#include "conv_copy.cuh"
#include "conv_wgmma.cuh"

namespace fastalex {

// NaN passes, as in torch.
__device__ __forceinline__ float activated(const ConvPlan& p, float v) {
  return p.relu && v < 0.0f ? 0.0f : v;
}

// Where each row of the block's tile goes: its first element in y, or in the partial sums; -1 past
// the last pixel.
template <class Tile>
__device__ __forceinline__ void build_destinations(const ConvPlan& p, const ConvBlock& b,
                                                   long long* table) {
  for (int row = threadIdx.x; row < Tile::BlockM; row += Tile::Threads) {
    const ConvPixel at = conv_pixel(p, b, b.first_row + row);
    const int oh = p.transposed ? at.i * p.h.stride + b.phase_h : at.i;
    const int ow = p.transposed ? at.j * p.w.stride + b.phase_w : at.j;
    const long long pixel =
        ((static_cast<long long>(b.split) * p.images + at.image) * p.h.out + oh) * p.w.out + ow;
    const long long element =
        p.partial ? pixel * p.groups * p.channels_out
                  : at.image * p.y_stride.image + oh * p.y_stride.row + ow * p.y_stride.column;
    table[row] = at.inside ? element : -1;
  }
}

// Depth was split: float32 sums go to the workspace, a second kernel adds them in order.
template <class Warp>
__device__ __forceinline__ void store_partial(const ConvPlan& p, const ConvBlock& b,
                                              const Warp& warp, const long long* destinations) {
  float* out = p.partial + b.group * p.channels_out + b.first_column;
  warp.for_each_pair([&](int row, int column, const float (&pair)[2]) {
    const long long at = destinations[row];
    if (at < 0) return;
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (b.first_column + column + e < p.channels_out)
        store_global(out + at + column + e, pair[e]);
  });
}

// Bias, activation and rounding in registers, then through shared memory to whole stores along the
// dense axis.
template <class T, class Tile, class Warp>
__device__ __forceinline__ void store_tile(const ConvPlan& p, const ConvBlock& b, const Warp& warp,
                                           const long long* destinations, char* tile) {
  constexpr int kPitch = OutputTile<Tile, T>::Pitch, kValues = 16 / sizeof(T),
                kChunks = Tile::BlockN / kValues;
  const T* bias = static_cast<const T*>(p.bias) + b.group * p.channels_out;
  warp.for_each_pair([&](int row, int column, const float (&pair)[2]) {
    float out[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int channel = b.first_column + column + e;
      out[e] = activated(
          p, pair[e] + (p.bias && channel < p.channels_out ? to_float(bias[channel]) : 0.0f));
    }
    store_shared_values(reinterpret_cast<T*>(tile + row * kPitch) + column, out);
  });
  __syncthreads();  // the tile is complete
  T* y = static_cast<T*>(p.y) + (b.group * p.channels_out + b.first_column) * p.y_stride.channel;
  if (p.packed_store) {
#pragma unroll 4
    for (int i = threadIdx.x; i < Tile::BlockM * kChunks; i += Tile::Threads) {
      const int row = i / kChunks, column = i % kChunks * kValues;
      const long long at = destinations[row];
      if (at >= 0 && b.first_column + column < p.channels_out)
        store_global(
            reinterpret_cast<uint4*>(y + at + column),
            load_shared(reinterpret_cast<const uint4*>(tile + row * kPitch + column * sizeof(T))));
    }
    return;
  }
  for (int i = threadIdx.x; i < Tile::BlockM * Tile::BlockN; i += Tile::Threads) {
    const int row = i % Tile::BlockM,
              column = i / Tile::BlockM;  // lanes on pixels: coalesced when columns are dense
    const long long at = destinations[row];
    if (at < 0 || b.first_column + column >= p.channels_out) continue;
    float value[1];
    load_shared_values(reinterpret_cast<const T*>(tile + row * kPitch) + column, value);
    store_values(y + at + column * p.y_stride.channel, value);
  }
}

// Shared memory of a block: the ring, which becomes the output tile; a destination a row; the taps.
template <class Tile, class T>
struct ConvShared {
  static constexpr int Destinations =
      Tile::RingBytes > OutputTile<Tile, T>::Bytes ? Tile::RingBytes : OutputTile<Tile, T>::Bytes;
  static constexpr int Taps = Destinations + Tile::BlockM * static_cast<int>(sizeof(long long));
};

// Walks through the tiles of depth; `issue(stage, tile)` starts the copies of one. They run Stages
// - 1 ahead of the multiplication, past the end too, where they become zeros: no branch keeps ptxas
// from moving them out of line.
template <class Warp, class Issue>
__device__ __forceinline__ void multiply_ring(Warp& warp, char* ring, int first, int last,
                                              const Issue& issue) {
  using Tile = typename Warp::Tile;
  constexpr int kLead = Tile::Stages - 1;
#pragma unroll
  for (int s = 0; s < kLead; s++) issue(ring + s * Tile::StageBytes, first + s);
  cp_async_wait<kLead - 1>();
  __syncthreads();  // the first stage has landed for every thread
  warp.load(ring, 0);

  int read = 0, write = kLead * Tile::StageBytes;
#pragma unroll 1
  for (int tile = first; tile < last; tile++) {
    issue(ring + write, tile + kLead);
    write = write == kLead * Tile::StageBytes ? 0 : write + Tile::StageBytes;
    const char* stage = ring + read;
    read = read == kLead * Tile::StageBytes ? 0 : read + Tile::StageBytes;
    if constexpr (Warp::kTensor) {
      warp.load(stage, 1);
      warp.multiply(0);
    } else {
      warp.multiply_stage(stage);
    }
    cp_async_wait<kLead - 1>();
    __syncthreads();  // the next stage has landed; this one is free
    if constexpr (Warp::kTensor) {
      warp.load(ring + read, 0);
      warp.multiply(1);
    }
  }
}

template <class Math, class Tile, template <class, class, int> class Copier, int Bytes>
__device__ __forceinline__ void compute_tile(const ConvPlan& p) {
  using T = typename Math::Element;
  constexpr int kDepth = kRowBytes / sizeof(T);
  char* ring = dynamic_shared();
  long long* destinations = reinterpret_cast<long long*>(ring + ConvShared<Tile, T>::Destinations);
  Tap* taps = reinterpret_cast<Tap*>(ring + ConvShared<Tile, T>::Taps);

  const ConvBlock b = conv_block<Tile>(p);
  if (b.first_row >= b.rows_h * b.rows_w * p.images) return;
  const int depth = b.taps_h.count * b.taps_w.count * p.tap_depth,
            k_tiles = (depth + kDepth - 1) / kDepth;
  const int share = (k_tiles + p.splits - 1) / p.splits;  // of the depth, in tiles
  const int first = min(b.split * share, k_tiles), last = min(first + share, k_tiles);

  build_taps<Tile>(
      p, b, tap_entries(b.taps_h.count * b.taps_w.count, p.tap_depth, Tile::Stages * kDepth), taps);
  build_destinations<Tile>(p, b, destinations);
  const Copier<T, Tile, Bytes> image(p, b);
  const WeightCopier<T, Tile> weight(p, b);
  __syncthreads();  // the tables are complete

  typename WarpOf<Math, Tile>::type warp;
  multiply_ring(warp, ring, first, last, [&](char* stage, int tile) {
    image.issue(p, taps, stage, tile * kDepth);
    weight.issue(p, stage, tile * kDepth);
    cp_async_commit();
  });
  cp_async_wait<0>();
  __syncthreads();  // the ring becomes the output tile
  if (p.partial)
    store_partial(p, b, warp, destinations);
  else
    store_tile<T, Tile>(p, b, warp, destinations, ring);
}

template <class Math, class Tile, template <class, class, int> class Copier, int Bytes>
__global__ void __launch_bounds__(Tile::Threads, Tile::MinBlocks) conv_relu(const ConvPlan p) {
  if constexpr (Math::kAvailable)
    compute_tile<Math, Tile, Copier, Bytes>(p);
  else
    stop_with_error();  // chosen for a GPU that this code was not made for
}

}  // namespace fastalex
