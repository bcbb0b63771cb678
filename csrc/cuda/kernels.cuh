// Every kernel in one source, for NVRTC: instantiated by name, so that only what a program uses is
// compiled.
#pragma once

#include "conv_parts.cuh"
#include "conv_relu.cuh"
#include "conv_weight_grad.cuh"
#include "lrn.cuh"
#include "lrn_backward.cuh"
#include "lrn_max_pool.cuh"
#include "max_pool.cuh"

using namespace fastalex;
