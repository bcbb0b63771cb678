// Predicted time of a part: FLOPs and bytes against rates of a core.
#pragma once
#include "part.h"

namespace fastalex::cpu::conv {

double predict_seconds(const ConvKernels& kernels, const Part& part, int threads);

}  // namespace fastalex::cpu::conv
