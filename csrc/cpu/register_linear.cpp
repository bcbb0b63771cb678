// The linear layer as torch sees it: fastalex_cpu::linear_relu and its backward, on the stable ABI.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "activation.h"
#include "kept_memory.h"
#include "library.h"
#include "linear.h"
#include "parallel.h"
#include "require.h"

namespace fastalex::cpu {
namespace {

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor dense_empty(int32_t dtype, Sizes sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(dtype, sizes, Sizes(strides.data(), strides.size()));
}

linear::Problem problem_of(const Tensor& input, const Tensor& weight) {
  require(input.is_cpu() && weight.is_cpu(), "the CPU kernels take CPU tensors");
  require(input.dim() >= 1 && weight.dim() == 2,
          "linear_relu takes input [..., I] and weight [O, I]");
  require(dtype_code(input) == dtype_code(weight),
          "linear_relu takes input and weight of one dtype");
  const int64_t outputs = weight.sizes()[0], inputs = weight.sizes()[1];
  require(input.sizes()[input.dim() - 1] == inputs, "the last dim of input is ",
          input.sizes()[input.dim() - 1], ", and weight takes ", inputs);
  constexpr int64_t kLimit = std::numeric_limits<int>::max() / 2;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) rows *= input.sizes()[d];
  require(inputs < kLimit && outputs < kLimit && rows < kLimit,
          "linear_relu takes fewer than 2^30 rows, inputs and outputs");
  const DType dtype = dtype_of(input);
  require(dtype != DType::kFloat64, "linear_relu takes float32, bfloat16 and float16");
  return {dtype, rows, static_cast<int>(inputs), static_cast<int>(outputs), true};
}

Tensor linear_relu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   bool relu) {
  linear::Problem problem = problem_of(input, weight);
  problem.relu = relu;
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = problem.outputs;
  const Tensor x = dense(input), w = dense(weight);
  std::optional<Tensor> b;
  if (bias) {
    require(bias->is_cpu() && dtype_code(*bias) == dtype_code(weight) && bias->dim() == 1 &&
                bias->sizes()[0] == problem.outputs,
            "the bias of linear_relu is [O], of the weight's dtype");
    b = dense(*bias);
  }
  const Tensor out = dense_empty(dtype_code(input), Sizes(sizes.data(), sizes.size()));
  const linear::Plan plan(kernels().conv(), problem, thread_count());
  const ScratchLease scratch(plan.forward_scratch_bytes());
  plan.forward({x.data_ptr(), w.data_ptr(), b ? b->data_ptr() : nullptr, out.mutable_data_ptr(),
                scratch.data()});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad,
                                                        const std::optional<Tensor>& output,
                                                        const Tensor& input, const Tensor& weight,
                                                        bool wants_input, bool wants_weight,
                                                        bool wants_bias) {
  const linear::Problem problem = problem_of(input, weight);
  const auto require_output_like = [&](const Tensor& tensor) {
    require(tensor.is_cpu() && dtype_code(tensor) == dtype_code(input) &&
                tensor.numel() == problem.rows * problem.outputs,
            "linear_relu_backward takes grad and output of the output's shape");
  };
  require_output_like(grad);
  if (output) require_output_like(*output);
  const Tensor g = dense(grad), x = dense(input), w = dense(weight);
  std::optional<Tensor> y;
  if (output) y = dense(*output);

  const int32_t dtype = dtype_code(input);
  const int64_t none[] = {0}, outputs[] = {problem.outputs};
  const auto created = [&](bool wanted, Sizes sizes) {
    return dense_empty(dtype, wanted ? sizes : Sizes(none, 1));
  };
  const Tensor grad_input = created(wants_input, input.sizes());
  const Tensor grad_weight = created(wants_weight, weight.sizes());
  const Tensor grad_bias = created(wants_bias, Sizes(outputs, 1));
  const linear::Plan plan(kernels().conv(), problem, thread_count());
  const ScratchLease scratch(plan.backward_scratch_bytes());
  plan.backward({g.data_ptr(), y ? y->data_ptr() : nullptr, x.data_ptr(), w.data_ptr(),
                 wants_input ? grad_input.mutable_data_ptr() : nullptr,
                 wants_weight ? grad_weight.mutable_data_ptr() : nullptr,
                 wants_bias ? grad_bias.mutable_data_ptr() : nullptr, scratch.data()});
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastalex::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastalex_cpu, m) {
  m.def("linear_relu(Tensor input, Tensor weight, Tensor? bias, bool relu) -> Tensor");
  m.def(
      "linear_relu_backward(Tensor grad, Tensor? output, Tensor input, Tensor weight, "
      "bool wants_input, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CPU, m) {
  m.impl("linear_relu", TORCH_BOX(&fastalex::cpu::linear_relu));
  m.impl("linear_relu_backward", TORCH_BOX(&fastalex::cpu::linear_relu_backward));
}
