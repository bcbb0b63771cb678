// The numbers of a call, in one float64 tensor: torch's boxing takes 0.1 us for a tensor and 0.2 us
// for every number.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"
#include "require.h"

namespace fastalex::cpu {

// Read one after another, in the order in which the operator's schema lists them.
class Numbers {
 public:
  // Throws unless `packed` is a dense vector of `count` doubles on the CPU.
  Numbers(const torch::stable::Tensor& packed, int64_t count)
      : next_(static_cast<const double*>(packed.data_ptr())) {
    require(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 1 &&
                packed.scalar_type() == torch::headeronly::ScalarType::Double,
            "numbers come as a float64 vector on the CPU");
    require(packed.numel() == count, "expected ", count, " numbers, got ", packed.numel());
  }

  double real() { return *next_++; }

  int64_t integer() {
    const double value = real();
    constexpr double kExact = 9007199254740992.0;  // 2^53: beyond, a double skips integers
    require(value > -kExact && value < kExact && value == static_cast<int64_t>(value),
            "expected an integer below 2^53, got ", value);
    return static_cast<int64_t>(value);
  }

 private:
  const double* next_;
};

}  // namespace fastalex::cpu
