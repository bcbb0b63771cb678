// Storage types of tensors, and the type each is computed in.
#pragma once
#include <cstdint>

namespace fastalex::cpu {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// float64 computes in float64; everything narrower accumulates in float32.
template <class Storage>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class Storage>
using compute_t = typename ComputeTypeOf<Storage>::type;

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Calls fn with a value of the storage type that `dtype` names.
template <class Fn>
inline void visit_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kFloat64:
      return fn(double{});
    case DType::kBFloat16:
      return fn(bfloat16{});
    case DType::kFloat16:
      return fn(float16{});
  }
}

}  // namespace fastalex::cpu
