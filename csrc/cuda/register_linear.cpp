// torch.ops.fastalex_cuda: a fully connected layer, its bias and ReLU, as a convolution: every row
// of the input is an image of one pixel, and the filter has one tap.
#include <optional>
#include <tuple>

#include "torch_views.h"

namespace fastalex {
namespace {

void check_linear(const Tensor& input, const Tensor& weight, const char* op) {
  check_cuda(input, op, "input");
  check_like(weight, input, op, "weight");
  require(input.dim() >= 2 && weight.dim() == 2, op, "input is ", describe(input), " and weight ",
          describe(weight), "; they must be [..., I] and [O, I]");
  require(weight.size(1) > 0 && weight.size(1) == input.size(input.dim() - 1), op, "weight ",
          describe(weight), " does not fit input ", describe(input),
          "; both must end in I, and it must not be 0");
}

// One row after another, each dense.
Tensor dense_rows(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 2 && t.stride(1) == 1) ? t : torch::stable::contiguous(t);
}

View rows_of(const Tensor& t) {
  const int64_t values = t.size(t.dim() - 1);
  const int64_t pitch = t.dim() == 2 ? t.stride(0) : values;
  return {address_of(t), {values ? t.numel() / values : 0, values, 1, 1}, {pitch, 1, 0, 0}};
}

View filters_of(const Tensor& weight) {
  return {address_of(weight),
          {weight.size(0), weight.size(1), 1, 1},
          {weight.stride(0), weight.stride(1), 0, 0}};
}

ConvParams one_tap(bool relu, bool tf32, bool wgmma) {
  return {{1, 1}, {0, 0}, {1, 1}, 1, tf32, relu, wgmma};
}

Sizes with_last(const Tensor& t, int64_t last) {
  const auto sizes = t.sizes();
  Sizes changed(sizes.begin(), sizes.end());
  changed.back() = last;
  return changed;
}

Tensor gradient_of(const Tensor& t, bool wanted, bool nothing) {
  if (!wanted) return empty({0}, t.scalar_type(), t, false);
  Tensor made = empty(with_last(t, t.size(t.dim() - 1)), t.scalar_type(), t, false);
  return nothing ? torch::stable::zero_(made) : made;
}

}  // namespace

Tensor linear_relu_op(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      bool relu, bool tf32, bool wgmma) {
  check_linear(input, weight, "linear_relu");
  if (bias) check_like(*bias, input, "linear_relu", "bias");
  const Tensor x = dense_rows(input);
  Tensor y = empty(with_last(x, weight.size(0)), x.scalar_type(), x, false);
  const std::optional<Tensor> b =
      bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const DType dtype = dtype_of(x, "linear_relu");
  const OnDevice device(x);
  launched("linear_relu", {&x, &weight}, [&] {
    const View vx = rows_of(x), vw = filters_of(weight), vy = rows_of(y);
    const ConvParams params = one_tap(relu, tf32, wgmma);
    const Tensor workspace = workspace_of(conv_relu_workspace(dtype, vx, vw, vy, params), x);
    conv_relu(dtype, vx, vw, b ? address_of(*b) : nullptr, vy, params, address_of(workspace),
              device.stream());
  });
  return y;
}

// Without an `output` there was no ReLU, and nothing is masked.
std::tuple<Tensor, Tensor, Tensor> linear_relu_backward_op(
    const Tensor& grad, const std::optional<Tensor>& output, const Tensor& input,
    const Tensor& weight, const std::vector<bool>& output_mask, bool tf32, bool wgmma) {
  check_linear(input, weight, "linear_relu_backward");
  check_like(grad, input, "linear_relu_backward", "grad");
  if (output) check_like(*output, input, "linear_relu_backward", "output");
  const Tensor x = dense_rows(input), g = dense_rows(grad);
  const Tensor y = output ? dense_rows(*output) : g;
  const DType dtype = dtype_of(x, "linear_relu_backward");
  const bool nothing = g.numel() == 0;
  Tensor grad_x = gradient_of(x, output_mask[0], nothing);
  Tensor grad_weight = gradient_of(weight, output_mask[1], nothing);
  Tensor grad_bias = empty({output_mask[2] ? weight.size(0) : 0}, x.scalar_type(), x, false);
  if (nothing) torch::stable::zero_(grad_bias);
  const OnDevice device(x);
  launched("linear_relu_backward", {&g, &x, &weight}, [&] {
    const ConvGradients wanted = {output_mask[0] ? rows_of(grad_x) : View{},
                                  output_mask[1] ? filters_of(grad_weight) : View{},
                                  output_mask[2] ? address_of(grad_bias) : nullptr};
    const View vy = rows_of(y), vx = rows_of(x), vw = filters_of(weight);
    const ConvParams params = one_tap(output.has_value(), tf32, wgmma);
    const Tensor workspace =
        workspace_of(conv_relu_backward_workspace(dtype, vy, vx, vw, wanted, params), x);
    conv_relu_backward(dtype, rows_of(g), vy, vx, vw, wanted, params, address_of(workspace),
                       device.stream());
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fastalex

FASTALEX_LIBRARY_FRAGMENT(FASTALEX_NAMESPACE, m) {
  m.def(
      "linear_relu(Tensor input, Tensor weight, Tensor? bias, bool relu, bool tf32, bool wgmma) -> "
      "Tensor");
  m.def(
      "linear_relu_backward(Tensor grad, Tensor? output, Tensor input, Tensor weight, bool[3] "
      "output_mask, bool tf32, bool wgmma) -> (Tensor, Tensor, Tensor)");
}

FASTALEX_LIBRARY_IMPL(FASTALEX_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("linear_relu", TORCH_BOX(&fastalex::linear_relu_op));
  m.impl("linear_relu_backward", TORCH_BOX(&fastalex::linear_relu_backward_op));
}
