// From a run-time element type to a compile-time one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "view.h"

namespace fastalex {

template <class T>
struct Element {
  using type = T;
};

template <class Function>
void visit_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::f32:
      return function(Element<float>());
    case DType::f16:
      return function(Element<__half>());
    case DType::bf16:
      return function(Element<__nv_bfloat16>());
  }
}

}  // namespace fastalex
