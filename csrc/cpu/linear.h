// Linear + bias + ReLU and its gradients on the convolution's micro-kernels. Free of torch.
//
// Weights are read as nn.Linear keeps them, [outputs][inputs], in their own type: nothing is
// packed, so a weight may change at every call and its memory is not doubled. The forward pass
// streams the weights once per 128 rows; each gradient touches them once.
#pragma once
#include <cstddef>
#include <cstdint>

#include "conv/kernels.h"

namespace fastalex::cpu::linear {

// y = relu(x W^T + b): x [rows][inputs], W [outputs][inputs], y [rows][outputs]; rows are dense.
struct Problem {
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int inputs = 0, outputs = 0;
  bool relu = true;
};

struct ForwardCall {
  const void* input;
  const void* weight;
  const void* bias;  // null: none
  void* output;
  void* scratch;
};

// dz = output <= 0 ? 0 : gradient, or gradient where `output` is null. Results that are null are
// not computed.
struct BackwardCall {
  const void* gradient;
  const void* output;
  const void* input;
  const void* weight;
  void* input_gradient;
  void* weight_gradient;
  void* bias_gradient;
  void* scratch;
};

// Immutable and cheap to make; results are bitwise equal for any number of threads.
class Plan {
 public:
  Plan(const conv::ConvKernels& kernels, const Problem& problem, int threads)
      : kernels_(&kernels), problem_(problem), threads_(threads) {}

  size_t forward_scratch_bytes() const;
  size_t backward_scratch_bytes() const;

  void forward(const ForwardCall& call) const;
  void backward(const BackwardCall& call) const;

 private:
  const conv::ConvKernels* kernels_;
  Problem problem_;
  int threads_;
};

}  // namespace fastalex::cpu::linear
