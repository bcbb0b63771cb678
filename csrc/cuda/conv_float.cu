// Convolution kernels on float32: IEEE, and rounded to TF32 for tensor cores.
#include "conv_run.h"

namespace fastalex {

void run_conv(Element<float>, const ConvJob& job, bool tf32, Stream stream) {
  tf32 ? run_tile<Tf32Math, TileFloat>(job, stream) : run_tile<FmaMath, TileFloat>(job, stream);
}

}  // namespace fastalex
