// Convolution kernels on float16.
#include "conv_run.h"

namespace fastalex {

void run_conv(Element<__half>, const ConvJob& job, bool, Stream stream) {
  run_half_conv<__half>(job, stream);
}

}  // namespace fastalex
