// Which tile, which copy and how many splits serve a convolution.
#pragma once

#include <algorithm>

#include "conv_relu.cuh"
#include "conv_weight_grad.cuh"
#include "plans.h"

namespace fastalex {

using TileWide =
    ConvTile<128, 128, 64, 64, 4, 2>;  // 64x64 a warp: the most reuse that registers allow
using TileMiddle = ConvTile<128, 96, 64, 48, 4, 2>;  // 96 and 192 output channels without waste
using TileFlat = ConvTile<64, 128, 64, 64, 4, 4>;    // finer waves at the same reuse
using TileSmall = ConvTile<64, 64, 32, 32, 4, 4>;    // few channels, few pixels
using TileFloat = ConvTile<128, 64, 64, 32, 4, 2>;   // float32: twice the bytes, half the width
// Hopper's, two warpgroups each of 64 rows: they read the image once and the weights twice; 192
// columns waste nothing on 192 and 384 channels, and no wider sums fit the registers of two blocks.
using TileGroup = ConvTile<128, 128, 16, 128, 6, 2>;
using TileGroupWide = ConvTile<128, 192, 16, 192, 5, 2>;

template <class T>
using WeightTileOf = WeightTile<T, 128, sizeof(T) == 2 ? 128 : 64, 64, sizeof(T) == 2 ? 64 : 32, 3>;

enum class ConvCopy { pixels, window, gather };
enum class ConvShapeOfTile { wide, middle, flat, small, floats, group, group_wide };

struct TileFacts {
  ConvShapeOfTile shape;
  int rows, columns, resident;  // resident: blocks an SM holds
  double reuse;                 // of the speed of light that shared memory leaves, relative
};
inline constexpr int kSMs = 132;

inline double tile_score(const TileFacts& t, long long pixels, long long channels,
                         long long others) {
  const long long rows = ceil_div(pixels, t.rows), columns = ceil_div(channels, t.columns);
  const double useful = static_cast<double>(pixels * channels) /
                        static_cast<double>(rows * t.rows * columns * t.columns);
  const double blocks = static_cast<double>(rows * columns * others),
               slots = static_cast<double>(kSMs) * t.resident;
  const double waves = std::max(1.0, static_cast<double>(ceil_div(static_cast<long long>(blocks),
                                                                  static_cast<long long>(slots))));
  return useful * t.reuse * std::min(1.0, blocks / (waves * slots) + 0.25);
}

inline TileFacts choose_group_tile(long long pixels, long long channels, long long others) {
  constexpr TileFacts kGroup = {ConvShapeOfTile::group, 128, 128, 2, 0.95};
  constexpr TileFacts kWide = {ConvShapeOfTile::group_wide, 128, 192, 2, 1.0};
  return tile_score(kWide, pixels, channels, others) > tile_score(kGroup, pixels, channels, others)
             ? kWide
             : kGroup;
}

inline TileFacts choose_tile(DType dtype, ConvCopy copy, long long pixels, long long channels,
                             long long others) {
  constexpr TileFacts kWide = {ConvShapeOfTile::wide, 128, 128, 2, 1.0};
  constexpr TileFacts kMiddle = {ConvShapeOfTile::middle, 128, 96, 2, 0.95};
  constexpr TileFacts kFlat = {ConvShapeOfTile::flat, 64, 128, 4, 0.95};
  constexpr TileFacts kSmall = {ConvShapeOfTile::small, 64, 64, 4, 0.6};
  constexpr TileFacts kFloat = {ConvShapeOfTile::floats, 128, 64, 2, 1.0};
  if (dtype == DType::f32) return kFloat;
  if (copy == ConvCopy::window) return kMiddle;
  TileFacts best = kSmall;
  for (const TileFacts& t : {kWide, kMiddle, kFlat, kSmall}) {
    if (copy == ConvCopy::gather && t.shape != ConvShapeOfTile::middle &&
        t.shape != ConvShapeOfTile::small)
      continue;
    if (tile_score(t, pixels, channels, others) > tile_score(best, pixels, channels, others))
      best = t;
  }
  return best;
}

// Splits of depth that fill the machine when the output alone does not; each keeps at least eight
// stages.
inline int choose_splits(long long blocks, long long k_tiles, int resident) {
  const long long slots = static_cast<long long>(kSMs) * resident;
  return static_cast<int>(
      std::clamp(std::min(slots / std::max(blocks, 1ll), k_tiles / 8), 1ll, 16ll));
}

// Rows of kernel * channels values can be copied whole: see WindowCopier.
inline bool windows_are_aligned(DType dtype, const View& x, const View& weight,
                                const ConvParams& p) {
  const long long bytes = dtype == DType::f32 ? 16 : 8, values = bytes / bytes_of(dtype),
                  channels = x.size[1];
  return p.groups == 1 && p.dilation[1] == 1 && channels_are_dense(x) && x.stride[3] == channels &&
         weight.size[3] * channels <= 64 && p.stride[1] * channels % values == 0 &&
         p.padding[1] * channels % values == 0 && x.stride[2] % values == 0 &&
         x.stride[0] % values == 0 && is_aligned(x.data, bytes) &&
         (p.padding[1] == 0 || x.size[3] * channels % values == 0);
}

inline ConvCopy choose_copy(DType dtype, const View& x, const View& weight, const ConvParams& p) {
  const int values = wide_values(dtype);
  if (channels_are_dense(x) && x.size[1] / p.groups % values == 0 &&
      packs_are_aligned(x, bytes_of(dtype), values, true))
    return ConvCopy::pixels;
  return windows_are_aligned(dtype, x, weight, p) ? ConvCopy::window : ConvCopy::gather;
}

}  // namespace fastalex
