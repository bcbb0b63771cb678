// The kernel table of each instruction set; call only those the machine can run.
#pragma once
#include "kernels.h"

namespace fastalex::cpu::avx512 {
const conv::ConvKernels& conv_kernels();
}
namespace fastalex::cpu::avx2 {
const conv::ConvKernels& conv_kernels();
}
namespace fastalex::cpu::portable {
const conv::ConvKernels& conv_kernels();
}
