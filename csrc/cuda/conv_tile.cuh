// Tiles of the matrix product and where their bytes lie in shared memory.
#pragma once

#include "conv_plan.h"
#include "pack.cuh"

namespace fastalex {

constexpr int kStepBytes = 32;  // depth of one tensor-core step: 16 halves or 8 floats
constexpr int kRowBytes = 64;   // depth of one stage: two steps

template <int BlockM_, int BlockN_, int WarpM_, int WarpN_, int Stages_, int MinBlocks_>
struct ConvTile {
  static constexpr int BlockM = BlockM_, BlockN = BlockN_, WarpM = WarpM_, WarpN = WarpN_;
  static constexpr int Stages = Stages_, MinBlocks = MinBlocks_;
  static constexpr int WarpsM = BlockM / WarpM, WarpsN = BlockN / WarpN,
                       Threads = 32 * WarpsM * WarpsN;
  static constexpr int InputBytes = BlockM * kRowBytes, WeightBytes = BlockN * kRowBytes;
  static constexpr int StageBytes = InputBytes + WeightBytes, RingBytes = StageBytes * Stages;
  static_assert(WarpM % 16 == 0 && WarpN % 16 == 0, "warp tiles are made of 16x16 pieces");
};

// The tile of results on its way out: an odd number of 16-byte chunks a row spreads rows over the
// banks.
template <class Tile, class T>
struct OutputTile {
  static constexpr int Pitch = Tile::BlockN * static_cast<int>(sizeof(T)) + 16;
  static constexpr int Bytes = Tile::BlockM * Pitch;
};

// 16-byte chunks are permuted in groups of rows spanning 128 bytes, so that eight rows fall on
// eight bank groups.
__device__ __forceinline__ int swizzled(int row, int byte) {
  return row * kRowBytes + (byte ^ (((row >> 1) & 3) << 4));
}

// What the block in hand computes.
struct ConvBlock {
  int group, first_row, first_column, phase, phase_h, phase_w, split;
  int rows_h, rows_w;  // outputs of this phase along each axis
  PhaseTaps taps_h, taps_w;
};

template <class Tile>
__device__ __forceinline__ ConvBlock conv_block(const ConvPlan& p) {
  ConvBlock b;
  int rest = blockIdx.x;
  const auto digit = [&rest](const FastDivide& by) {
    const int quotient = by(rest), remainder = rest - quotient * static_cast<int>(by.divisor);
    rest = quotient;
    return remainder;
  };
  b.first_column = digit(p.by_columns) * Tile::BlockN;
  b.group = digit(p.by_groups);
  b.first_row = digit(p.by_rows) * Tile::BlockM;
  b.phase = digit(p.by_phases);
  b.split = rest;
  b.phase_h = p.by_phases_w(b.phase),
  b.phase_w = b.phase - b.phase_h * static_cast<int>(p.by_phases_w.divisor);
  const int step_h = p.transposed ? p.h.stride : 1, step_w = p.transposed ? p.w.stride : 1;
  b.rows_h = (p.h.out - b.phase_h + step_h - 1) / step_h,
  b.rows_w = (p.w.out - b.phase_w + step_w - 1) / step_w;
  b.taps_h = phase_taps(p.h, p.transposed, b.phase_h),
  b.taps_w = phase_taps(p.w, p.transposed, b.phase_w);
  if (p.window_values) b.taps_w = {0, 1};
  return b;
}

struct ConvPixel {
  int image, i, j;  // i, j: indices inside the phase
  bool inside;
};
__device__ __forceinline__ ConvPixel conv_pixel(const ConvPlan& p, const ConvBlock& b, int row) {
  const unsigned line = static_cast<unsigned>(row) / b.rows_w, image = line / b.rows_h;
  return {static_cast<int>(image), static_cast<int>(line - image * b.rows_h),
          static_cast<int>(row - line * b.rows_w), static_cast<int>(image) < p.images};
}

// A tap: how far its values lie from a pixel's origin, and the position that must be inside the
// image.
struct Tap {
  long long offset;
  int row, column;
};
constexpr int kNowhere = -(1 << 30);

union TapWord {
  uint4 word;
  Tap tap;
  __device__ __forceinline__ TapWord() {}
};
__device__ __forceinline__ Tap load_tap(const Tap* table) {
  TapWord loaded;
  loaded.word = load_shared<uint4>(shared_address(table));
  return loaded.tap;
}
__device__ __forceinline__ void store_tap(Tap* table, const Tap& tap) {
  TapWord stored;
  stored.tap = tap;
  store_shared(reinterpret_cast<uint4*>(table), stored.word);
}

// Every depth the pipeline may ask for, its run-ahead past the end included, finds an entry; those
// past the end lie nowhere.
#ifdef __CUDACC__
__host__ __device__
#endif
    inline int tap_entries(int taps, int tap_depth, int run_ahead) {
  return taps + (run_ahead + tap_depth - 1) / tap_depth + 1;
}

template <class Tile>
__device__ __forceinline__ void build_taps(const ConvPlan& p, const ConvBlock& b, int entries,
                                           Tap* table) {
  const int taps = b.taps_h.count * b.taps_w.count;
  for (int i = threadIdx.x; i < entries; i += Tile::Threads) {
    Tap tap = {0, kNowhere, 0};
    if (i < taps) {
      const int r = b.taps_h.first + i / b.taps_w.count * p.h.period;
      const int s = b.taps_w.first + i % b.taps_w.count * p.w.period;
      tap.row = tap_position(p.h, p.transposed, b.phase_h, r);
      tap.column = tap_position(p.w, p.transposed, b.phase_w, s);
      tap.offset = tap.row * p.x_stride.row + tap.column * p.x_stride.column;
    }
    store_tap(table + i, tap);
  }
}

}  // namespace fastalex
