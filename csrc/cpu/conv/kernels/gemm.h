// The register-blocked matrix products under every convolution: C += A B and C += A^T B.
#pragma once
#include "../kernels.h"

namespace fastalex::cpu::FASTALEX_ISA {

// Rows of a block: as many accumulators as leave room for the B vectors and one broadcast.
#if defined(__AVX512F__)
inline constexpr int kMaxRows = 14;
#else
inline constexpr int kMaxRows = 6;
#endif
inline constexpr int kMaxVectors = 2;

void gemm(const conv::GemmCall& call);
void outer(const conv::OuterCall& call);

}  // namespace fastalex::cpu::FASTALEX_ISA
