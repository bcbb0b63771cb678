// A forward convolution on tensors: what its operators share to check, plan and pack. Stable ABI
// only.
#pragma once
#include <memory>
#include <optional>

#include "activation.h"
#include "conv_plans.h"
#include "numbers.h"
#include "packed.h"

namespace fastalex::cpu {

inline constexpr int64_t kGeometryNumbers = 7;

// Throws unless the numbers (stride, padding, dilation, groups) describe a convolution of the two
// that the engine computes.
conv::Problem conv_problem(const Tensor& input, const Tensor& weight, Numbers& numbers);

// The plan of a pass, on the engine that a test forces or else the cost model picks.
std::shared_ptr<const conv::Plan> plan_of(const conv::Problem& problem, conv::Pass pass);

// A dense vector of one value of the input's dtype for each output channel.
std::optional<Tensor> channel_row(const std::optional<Tensor>& row, const char* name,
                                  const Tensor& input, const Tensor& weight);

conv::ConstTensor conv_view(const Tensor& tensor);

// The plan's weights, packed or kept from an earlier call; `weight` is dense.
std::shared_ptr<const Buffer> packed_weights(const conv::Plan& plan, DType dtype,
                                             const Tensor& weight);

}  // namespace fastalex::cpu
