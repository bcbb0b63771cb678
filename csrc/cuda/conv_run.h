// Starts the kernels of a ConvJob; one declaration a family, so that the instances compile in
// parallel.
#pragma once

#include "conv_job.h"
#include "dispatch.h"

namespace fastalex {

void run_conv(Element<__half>, const ConvJob& job, bool tf32, Stream stream);
void run_conv(Element<__nv_bfloat16>, const ConvJob& job, bool tf32, Stream stream);
void run_conv(Element<float>, const ConvJob& job, bool tf32, Stream stream);
void run_wgmma(Element<__half>, const ConvJob& job, Stream stream);
void run_wgmma(Element<__nv_bfloat16>, const ConvJob& job, Stream stream);

template <class Math, class Tile>
void run_tile(const ConvJob& job, Stream stream) {
  constexpr int kWindowBytes = kWindowCopyValues * sizeof(typename Math::Element);
  if (job.copy == ConvCopy::pixels)
    launch<conv_relu<Math, Tile, PixelCopier, 16>>(job.shape, stream, job.plan);
  else if constexpr (Tile::BlockN == 96 || sizeof(typename Math::Element) == 4) {
    if (job.copy == ConvCopy::window)
      launch<conv_relu<Math, Tile, WindowCopier, kWindowBytes>>(job.shape, stream, job.plan);
    else
      launch<conv_relu<Math, Tile, GatherCopier, 16>>(job.shape, stream, job.plan);
  } else if constexpr (Tile::BlockN == 64) {
    launch<conv_relu<Math, Tile, GatherCopier, 16>>(job.shape, stream, job.plan);
  }
}

template <class T>
void run_half_conv(const ConvJob& job, Stream stream) {
  switch (job.tile.shape) {
    case ConvShapeOfTile::group:
    case ConvShapeOfTile::group_wide:
      return run_wgmma(Element<T>(), job, stream);
    case ConvShapeOfTile::wide:
      return run_tile<HalfMath<T>, TileWide>(job, stream);
    case ConvShapeOfTile::middle:
      return run_tile<HalfMath<T>, TileMiddle>(job, stream);
    case ConvShapeOfTile::flat:
      return run_tile<HalfMath<T>, TileFlat>(job, stream);
    default:
      return run_tile<HalfMath<T>, TileSmall>(job, stream);
  }
}

}  // namespace fastalex
