// torch.ops.fastalex_cuda: convolution with bias and ReLU. `tf32` rounds float32 for tensor cores;
// `wgmma` multiplies 16-bit values with Hopper's instruction, or says why it can't.
#include <optional>
#include <tuple>

#include "torch_views.h"

namespace fastalex {
namespace {

ConvParams conv_params(const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                       int64_t groups, bool tf32, bool wgmma) {
  ConvParams p;
  for (int axis = 0; axis < 2; axis++) {
    p.stride[axis] = static_cast<int>(stride[axis]),
    p.padding[axis] = static_cast<int>(padding[axis]);
    p.dilation[axis] = static_cast<int>(dilation[axis]);
  }
  p.groups = static_cast<int>(groups), p.tf32 = tf32, p.relu = true, p.wgmma = wgmma;
  return p;
}

void check_conv(const Tensor& input, const Tensor& weight, int64_t groups, const char* op) {
  check_cuda(input, op, "input");
  check_like(weight, input, op, "weight");
  require(input.dim() == 4 && weight.dim() == 4, op, "input is ", describe(input), " and weight ",
          describe(weight), "; they must be [N, C, H, W] and [K, C / groups, R, S]");
  require(groups >= 1 && weight.size(1) * groups == input.size(1) && weight.size(0) % groups == 0,
          op, "weight ", describe(weight), " does not fit ", input.size(1), " channels in ", groups,
          " groups; it must be [K, C / groups, R, S], and groups divide K");
}

Sizes output_sizes(const Tensor& input, const Tensor& weight, const ConvParams& p, const char* op) {
  Sizes sizes = {input.size(0), weight.size(0), 0, 0};
  for (int axis = 0; axis < 2; axis++) {
    sizes[2 + axis] = pool_outputs(input.size(2 + axis), weight.size(2 + axis), p.stride[axis],
                                   p.padding[axis], p.dilation[axis], false);
    require(sizes[2 + axis] > 0, op, "a kernel of ", weight.size(2 + axis), " with padding ",
            p.padding[axis], " and dilation ", p.dilation[axis], " does not fit input ",
            describe(input), ": pad more, or take a smaller one");
  }
  return sizes;
}

// A gradient that is wanted; with nothing to sum over, kernels do not run and it is zero.
Tensor gradient_like(const Tensor& t, bool wanted, bool nothing) {
  if (!wanted) return empty({0}, t.scalar_type(), t, false);
  const auto sizes = t.sizes();
  Tensor made = empty(Sizes(sizes.begin(), sizes.end()), t.scalar_type(), t, is_channels_last(t));
  return nothing ? torch::stable::zero_(made) : made;
}

}  // namespace

Tensor conv_relu_op(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                    int64_t groups, bool tf32, bool wgmma) {
  check_conv(input, weight, groups, "conv_relu");
  if (bias) check_like(*bias, input, "conv_relu", "bias");
  const Tensor x = dense(input);
  const ConvParams params = conv_params(stride, padding, dilation, groups, tf32, wgmma);
  Tensor y =
      empty(output_sizes(x, weight, params, "conv_relu"), x.scalar_type(), x, is_channels_last(x));
  const std::optional<Tensor> b =
      bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const DType dtype = dtype_of(x, "conv_relu");
  const OnDevice device(x);
  launched("conv_relu", {&x, &weight}, [&] {
    const View vx = view_of(x), vw = view_of(weight), vy = view_of(y);
    const Tensor workspace = workspace_of(conv_relu_workspace(dtype, vx, vw, vy, params), x);
    conv_relu(dtype, vx, vw, b ? address_of(*b) : nullptr, vy, params, address_of(workspace),
              device.stream());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_backward_op(const Tensor& grad, const Tensor& output,
                                                         const Tensor& input, const Tensor& weight,
                                                         const Sizes& stride, const Sizes& padding,
                                                         const Sizes& dilation, int64_t groups,
                                                         const std::vector<bool>& output_mask,
                                                         bool tf32, bool wgmma) {
  check_conv(input, weight, groups, "conv_relu_backward");
  check_like(grad, input, "conv_relu_backward", "grad");
  check_like(output, input, "conv_relu_backward", "output");
  const Tensor x = dense(input), g = dense_as(grad, is_channels_last(output));
  const ConvParams params = conv_params(stride, padding, dilation, groups, tf32, wgmma);
  const DType dtype = dtype_of(x, "conv_relu_backward");
  const bool nothing = output.numel() == 0;
  Tensor grad_x = gradient_like(x, output_mask[0], nothing);
  Tensor grad_weight = gradient_like(weight, output_mask[1], nothing);
  Tensor grad_bias = empty({output_mask[2] ? weight.size(0) : 0}, x.scalar_type(), x, false);
  if (nothing) torch::stable::zero_(grad_bias);
  const OnDevice device(x);
  launched("conv_relu_backward", {&g, &x, &weight}, [&] {
    const ConvGradients wanted = {output_mask[0] ? view_of(grad_x) : View{},
                                  output_mask[1] ? view_of(grad_weight) : View{},
                                  output_mask[2] ? address_of(grad_bias) : nullptr};
    const View vy = view_of(output), vx = view_of(x), vw = view_of(weight);
    const Tensor workspace =
        workspace_of(conv_relu_backward_workspace(dtype, vy, vx, vw, wanted, params), x);
    conv_relu_backward(dtype, view_of(g), vy, vx, vw, wanted, params, address_of(workspace),
                       device.stream());
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace fastalex

#define FASTALEX_CONV "int[2] stride, int[2] padding, int[2] dilation, int groups"

FASTALEX_LIBRARY_FRAGMENT(FASTALEX_NAMESPACE, m) {
  m.def("conv_relu(Tensor input, Tensor weight, Tensor? bias, " FASTALEX_CONV
        ", bool tf32, bool wgmma) -> Tensor");
  m.def("conv_relu_backward(Tensor grad, Tensor output, Tensor input, Tensor weight, " FASTALEX_CONV
        ", bool[3] output_mask, bool tf32, bool wgmma) -> (Tensor, Tensor, Tensor)");
}

FASTALEX_LIBRARY_IMPL(FASTALEX_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("conv_relu", TORCH_BOX(&fastalex::conv_relu_op));
  m.impl("conv_relu_backward", TORCH_BOX(&fastalex::conv_relu_backward_op));
}
