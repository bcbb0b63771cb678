// Linear + bias + ReLU and its gradients on the convolution's micro-kernel. Free of torch.
//
// Weights are packed once per version as [panel of outputs][input][panel width] in float; the same
// packing serves the forward pass and the input gradient, each of which streams it once. At batch 1
// the forward pass runs at the speed of memory: 4 bytes per multiply-add.
#pragma once
#include <cstddef>
#include <cstdint>

#include "conv/kernels.h"

namespace fastalex::cpu::linear {

// y = relu(x W^T + b): x [rows][inputs], W [outputs][inputs], y [rows][outputs], all dense.
struct Problem {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int inputs = 0, outputs = 0;
  bool relu = true;
};

struct ForwardCall {
  const void* input;
  const void* packed;
  const void* bias;  // null: none
  void* output;
  void* scratch;
};

// dz = output > 0 ? gradient : 0, or gradient where `output` is null. Results that are null are not
// computed; `packed` is needed for the input gradient alone.
struct BackwardCall {
  const void* gradient;
  const void* output;
  const void* input;
  const void* packed;
  void* input_gradient;
  void* weight_gradient;
  void* bias_gradient;
  void* scratch;
};

// An immutable plan, as conv::Plan; results are bitwise equal for any number of threads.
class Plan {
 public:
  Plan(const conv::ConvKernels& kernels, const Problem& problem, int threads)
      : kernels_(&kernels), problem_(problem), threads_(threads) {}

  size_t packed_bytes() const;
  size_t scratch_bytes() const;  // of either pass

  void pack(const void* weight, void* packed) const;
  void forward(const ForwardCall& call) const;
  void backward(const BackwardCall& call) const;

 private:
  const conv::ConvKernels* kernels_;
  Problem problem_;
  int threads_;
};

}  // namespace fastalex::cpu::linear
