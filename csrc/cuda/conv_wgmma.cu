// Convolution kernels of Hopper's warpgroups, on float16 and bfloat16.
#include "conv_run.h"

namespace fastalex {
namespace {

template <class T>
void run_group_tile(const ConvJob& job, Stream stream) {
  if (job.tile.shape == ConvShapeOfTile::group)
    launch<conv_relu<WgmmaMath<T>, TileGroup, PixelCopier, 16>>(job.shape, stream, job.plan);
  else
    launch<conv_relu<WgmmaMath<T>, TileGroupWide, PixelCopier, 16>>(job.shape, stream, job.plan);
}

}  // namespace

void run_wgmma(Element<__half>, const ConvJob& job, Stream stream) {
  run_group_tile<__half>(job, stream);
}
void run_wgmma(Element<__nv_bfloat16>, const ConvJob& job, Stream stream) {
  run_group_tile<__nv_bfloat16>(job, stream);
}

}  // namespace fastalex
