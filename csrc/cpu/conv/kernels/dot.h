// Products of matrix rows with matrix rows, read as they lie in memory: a linear layer's forward
// pass.
#pragma once
#include "../kernels.h"

namespace fastalex::cpu::FASTALEX_ISA {

// A register block is kDotRows x kDotOutputs sums, the rows' vectors and one of the weights'.
#if defined(__AVX512F__)
inline constexpr int kDotRows = 4, kDotOutputs = 6;
#else
inline constexpr int kDotRows = 3, kDotOutputs = 4;
#endif

void dot(const conv::DotCall& call);
void add_lanes(const float* vectors, int64_t count, bool relu, float* out);

}  // namespace fastalex::cpu::FASTALEX_ISA
