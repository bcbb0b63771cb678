// The multiplication of two shared tiles by warpgroups, Hopper's way: wgmma reads both where the
// copies put them, and runs on while the warps start the next copies.
#pragma once

#include "conv_math.cuh"

namespace fastalex {

template <class T>
struct WgmmaMath {
  using Element = T;
  static constexpr bool kAvailable = kHasWgmma;
};

// Rows of 64 bytes along depth, as `swizzled` lays them: the hardware's own 64-byte swizzle, whose
// pattern repeats every 8 rows. PTX ISA, matrix descriptor: address, (ignored) leading distance and
// distance of 8 rows in units of 16 bytes, swizzle mode.
__device__ __forceinline__ unsigned long long wgmma_operand(SharedAddress tile) {
  static_assert(kRowBytes == 64, "the descriptor tells of the 64-byte swizzle");
  constexpr unsigned long long kEightRows = 8 * kRowBytes / 16, kSwizzle64 = 2;
  return wgmma_address(tile) / 16 | 1ull << 16 | kEightRows << 32 | kSwizzle64 << 62;
}

// Sums of a warp: 16 rows of its warpgroup's 64, laid over lanes as mma.sync lays them.
template <class Math, class Tile>
struct WgmmaWarp : TensorSums<Math, Tile> {
  static_assert(Tile::WarpM == 16 && Tile::WarpN == Tile::BlockN && Tile::WarpsM % 4 == 0,
                "four warps share 64 rows and every column");
  int a_offset;

  __device__ __forceinline__ WgmmaWarp() { a_offset = threadIdx.x / 128 * 64 * kRowBytes; }
  __device__ __forceinline__ void start(const char* stage) {
    const SharedAddress base = shared_address(stage);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kRowBytes / kStepBytes; step++)
      wgmma_m64k16<typename Math::Element>(
          this->sum[0], wgmma_operand(base + a_offset + step * kStepBytes),
          wgmma_operand(base + Tile::InputBytes + step * kStepBytes));
    wgmma_commit();
  }
  // Until at most `Pending` stages are being multiplied.
  template <int Pending>
  __device__ __forceinline__ void finish() {
    wgmma_wait<Pending>(this->sum[0]);
  }
};

template <class T, class Tile>
struct WarpOf<WgmmaMath<T>, Tile> {
  using type = WgmmaWarp<WgmmaMath<T>, Tile>;
};

// Walks through the tiles of depth; `issue(stage, tile)` starts the copies of one. A stage is
// multiplied while the one before it still is, so copies run Stages - 2 ahead.
template <class Math, class Tile, class Issue>
__device__ __forceinline__ void multiply_ring(WgmmaWarp<Math, Tile>& warp, char* ring, int first,
                                              int last, const Issue& issue) {
  constexpr int kLead = Tile::Stages - 2, kEnd = Tile::RingBytes - Tile::StageBytes;
#pragma unroll
  for (int s = 0; s < kLead; s++) issue(ring + s * Tile::StageBytes, first + s);
  int read = 0, write = kLead * Tile::StageBytes;
#pragma unroll 1
  for (int tile = first; tile < last; tile++) {
    cp_async_wait<kLead - 1>();
    fence_async_proxy();
    __syncthreads();  // this stage has landed for every thread; the one before the last is free
    warp.start(ring + read);
    issue(ring + write, tile + kLead);
    warp.template finish<1>();
    read = read == kEnd ? 0 : read + Tile::StageBytes;
    write = write == kEnd ? 0 : write + Tile::StageBytes;
  }
  warp.template finish<0>();
}

}  // namespace fastalex
