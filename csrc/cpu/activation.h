// Torch tensors as the Maps kernels take, and new tensors in their layout. Stable ABI only.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

namespace fastalex::cpu {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// A tensor with the Map of its memory; it keeps alive the copy made where the kernels cannot take
// the strides.
struct Activation {
  Tensor tensor;
  Map map{};
};

// Throws for a dtype the kernels lack.
DType dtype_of(const Tensor& tensor);

// [N, C, ...] with one or more trailing dims, folded into height and width. Served in place: dense
// NCHW planes and adjacent channels, whatever the other strides. Anything else is copied once, to
// contiguous.
Activation read(const Tensor& tensor);

// The same, in the layout given; copied once if it has another.
Activation read_as(const Tensor& tensor, bool channels_last);

// Whether results of a tensor's shape should be channels last, as its own layout is.
bool is_channels_last(const Tensor& tensor);

// A weight as kernels may read it in one run: itself where its elements are dense in memory, in
// whatever order, else a contiguous copy.
Tensor dense_weight(const Tensor& weight);

// New memory, NaN-filled under test; throws where there is not enough. dtype: an aoti_torch_dtype_*
// code.
Tensor empty_strided(int32_t dtype, Sizes sizes, Sizes strides);

// A new dense activation of `sizes` in the given layout.
Activation create(int32_t dtype, Sizes sizes, bool channels_last);

int32_t dtype_code(const Tensor& tensor);

}  // namespace fastalex::cpu
