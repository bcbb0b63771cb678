// Convolution kernels on bfloat16.
#include "conv_run.h"

namespace fastalex {

void run_conv(Element<__nv_bfloat16>, const ConvJob& job, bool, Stream stream) {
  run_half_conv<__nv_bfloat16>(job, stream);
}

}  // namespace fastalex
