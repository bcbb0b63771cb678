// torch.ops.fastalex_cuda: the memory-bound operators.
#include <tuple>

#include "torch_views.h"

namespace fastalex {
namespace {

LrnParams lrn_params(int64_t size, double scale, double beta, double k, int64_t groups) {
  return {static_cast<int>(size), static_cast<float>(scale), static_cast<float>(beta),
          static_cast<float>(k), static_cast<int>(groups)};
}

PoolParams pool_params(const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                       const Sizes& dilation) {
  PoolParams p;
  for (int axis = 0; axis < 2; axis++) {
    p.kernel[axis] = static_cast<int>(kernel[axis]),
    p.stride[axis] = static_cast<int>(stride[axis]);
    p.padding[axis] = static_cast<int>(padding[axis]),
    p.dilation[axis] = static_cast<int>(dilation[axis]);
  }
  return p;
}

void check_lrn_input(const Tensor& input, int64_t size, int64_t groups, const char* op) {
  check_cuda(input, op, "input");
  require(input.dim() >= 3, op, "input is ", describe(input),
          "; it must be [N, C, ...]: unsqueeze() what it lacks");
  require(size >= 1, op, "size is ", size, "; it must be at least 1 channel");
  require(groups >= 1 && input.size(1) % groups == 0, op, "groups is ", groups,
          "; it must divide the ", input.size(1), " channels");
}

void check_pool_input(const Tensor& input, const char* op) {
  check_cuda(input, op, "input");
  require(input.dim() == 4, op, "input is ", describe(input),
          "; it must be [N, C, H, W]: unsqueeze(0) a single image");
}

Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

struct PoolOutputs {
  Tensor output, offsets;
  Offsets where;
};

PoolOutputs pool_outputs_of(const Tensor& input, bool channels_last, const PoolParams& p,
                            bool ceil_mode, bool save, const char* op) {
  Sizes sizes = {input.size(0), input.size(1), 0, 0};
  for (int axis = 0; axis < 2; axis++) {
    sizes[2 + axis] = pool_outputs(input.size(2 + axis), p.kernel[axis], p.stride[axis],
                                   p.padding[axis], p.dilation[axis], ceil_mode);
    require(sizes[2 + axis] > 0, op, "a window of ", p.kernel[axis], " with padding ",
            p.padding[axis], " and dilation ", p.dilation[axis], " does not fit input ",
            describe(input), ": pad more, or take a smaller one");
  }
  const bool wide = p.kernel[0] * p.kernel[1] > 256;
  Tensor output = empty(sizes, input.scalar_type(), input, channels_last);
  if (!save) return {output, empty({0}, ScalarType::Byte, input, false), {}};
  Tensor offsets = empty(sizes, wide ? ScalarType::Int : ScalarType::Byte, input, channels_last);
  return {output, offsets, {view_of(offsets), wide}};
}

Offsets offsets_of(const Tensor& offsets, const Tensor& grad, const char* op) {
  check_cuda(offsets, op, "offsets");
  require(sizes_of(offsets) == sizes_of(grad), op, "offsets are ", describe(offsets), " and grad ",
          describe(grad), "; they must have one shape: run forward with save_offsets=True");
  return {view_of(offsets), offsets.scalar_type() == ScalarType::Int};
}

}  // namespace

Tensor lrn_op(const Tensor& input, int64_t size, double scale, double beta, double k,
              int64_t groups) {
  check_lrn_input(input, size, groups, "lrn");
  const Tensor x = dense(input);
  Tensor y = empty(sizes_of(x), x.scalar_type(), x, is_channels_last(x));
  const OnDevice device(x);
  launched("lrn", {&x}, [&] {
    lrn(dtype_of(x, "lrn"), view_of(x), view_of(y), lrn_params(size, scale, beta, k, groups),
        device.stream());
  });
  return y;
}

Tensor lrn_backward_op(const Tensor& grad, const Tensor& input, int64_t size, double scale,
                       double beta, double k, int64_t groups) {
  check_lrn_input(input, size, groups, "lrn_backward");
  check_like(grad, input, "lrn_backward", "grad");
  const Tensor x = dense(input), g = dense_as(grad, is_channels_last(x));
  Tensor grad_x = empty(sizes_of(x), x.scalar_type(), x, is_channels_last(x));
  const OnDevice device(x);
  launched("lrn_backward", {&g, &x}, [&] {
    lrn_backward(dtype_of(x, "lrn_backward"), view_of(g), view_of(x), view_of(grad_x),
                 lrn_params(size, scale, beta, k, groups), device.stream());
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> max_pool_op(const Tensor& input, const Sizes& kernel,
                                       const Sizes& stride, const Sizes& padding,
                                       const Sizes& dilation, bool ceil_mode, bool save_offsets) {
  check_pool_input(input, "max_pool");
  const PoolParams params = pool_params(kernel, stride, padding, dilation);
  const Tensor x = dense(input);
  PoolOutputs out =
      pool_outputs_of(x, is_channels_last(x), params, ceil_mode, save_offsets, "max_pool");
  const OnDevice device(x);
  launched("max_pool", {&x}, [&] {
    max_pool(dtype_of(x, "max_pool"), view_of(x), view_of(out.output), out.where, params,
             device.stream());
  });
  return {out.output, out.offsets};
}

Tensor max_pool_backward_op(const Tensor& grad, const Tensor& offsets, const Sizes& input_size,
                            const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                            const Sizes& dilation) {
  check_pool_input(grad, "max_pool_backward");
  const bool channels_last = is_channels_last(offsets);
  const Tensor g = dense_as(grad, channels_last);
  Tensor grad_x = empty({g.size(0), g.size(1), input_size[0], input_size[1]}, g.scalar_type(), g,
                        channels_last);
  const OnDevice device(g);
  launched("max_pool_backward", {&g}, [&] {
    max_pool_backward(dtype_of(g, "max_pool_backward"), view_of(g),
                      offsets_of(offsets, g, "max_pool_backward"), view_of(grad_x),
                      pool_params(kernel, stride, padding, dilation), device.stream());
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> lrn_max_pool_op(const Tensor& input, int64_t size, double scale,
                                           double beta, double k, int64_t groups,
                                           const Sizes& kernel, const Sizes& stride,
                                           const Sizes& padding, bool ceil_mode,
                                           bool save_offsets) {
  check_pool_input(input, "lrn_max_pool");
  check_lrn_input(input, size, groups, "lrn_max_pool");
  const Tensor x = dense(input);
  const PoolParams pool = pool_params(kernel, stride, padding, {1, 1});
  PoolOutputs out =
      pool_outputs_of(x, is_channels_last(x), pool, ceil_mode, save_offsets, "lrn_max_pool");
  const DType dtype = dtype_of(x, "lrn_max_pool");
  if (!lrn_max_pool_is_fused(dtype, view_of(x), view_of(out.output), pool))
    return max_pool_op(lrn_op(x, size, scale, beta, k, groups), kernel, stride, padding, {1, 1},
                       ceil_mode, save_offsets);
  const OnDevice device(x);
  launched("lrn_max_pool", {&x}, [&] {
    lrn_max_pool(dtype, view_of(x), view_of(out.output), out.where,
                 lrn_params(size, scale, beta, k, groups), pool, device.stream());
  });
  return {out.output, out.offsets};
}

Tensor lrn_max_pool_backward_op(const Tensor& grad, const Tensor& input, const Tensor& offsets,
                                int64_t size, double scale, double beta, double k, int64_t groups,
                                const Sizes& kernel, const Sizes& stride, const Sizes& padding) {
  check_pool_input(input, "lrn_max_pool_backward");
  check_lrn_input(input, size, groups, "lrn_max_pool_backward");
  check_like(grad, input, "lrn_max_pool_backward", "grad");
  const Tensor x = dense(input), g = dense_as(grad, is_channels_last(x));
  Tensor grad_x = empty(sizes_of(x), x.scalar_type(), x, is_channels_last(x));
  const OnDevice device(x);
  launched("lrn_max_pool_backward", {&g, &x}, [&] {
    lrn_max_pool_backward(dtype_of(x, "lrn_max_pool_backward"), view_of(g), view_of(x),
                          offsets_of(offsets, g, "lrn_max_pool_backward"), view_of(grad_x),
                          lrn_params(size, scale, beta, k, groups),
                          pool_params(kernel, stride, padding, {1, 1}), device.stream());
  });
  return grad_x;
}

#ifdef FASTALEX_CUDA_ARCHITECTURES
std::string architectures_op() { return FASTALEX_CUDA_ARCHITECTURES; }
#endif

}  // namespace fastalex

#define FASTALEX_LRN "int size, float scale, float beta, float k, int groups"
#define FASTALEX_POOL "int[2] kernel_size, int[2] stride, int[2] padding"

FASTALEX_LIBRARY(FASTALEX_NAMESPACE, m) {
  m.def("lrn(Tensor input, " FASTALEX_LRN ") -> Tensor");
  m.def("lrn_backward(Tensor grad, Tensor input, " FASTALEX_LRN ") -> Tensor");
  m.def("max_pool(Tensor input, " FASTALEX_POOL
        ", int[2] dilation, bool ceil_mode, bool save_offsets) -> (Tensor, Tensor)");
  m.def("max_pool_backward(Tensor grad, Tensor offsets, int[2] input_size, " FASTALEX_POOL
        ", int[2] dilation) -> Tensor");
  m.def("lrn_max_pool(Tensor input, " FASTALEX_LRN ", " FASTALEX_POOL
        ", bool ceil_mode, bool save_offsets) -> (Tensor, Tensor)");
  m.def("lrn_max_pool_backward(Tensor grad, Tensor input, Tensor offsets, " FASTALEX_LRN
        ", " FASTALEX_POOL ") -> Tensor");
#ifdef FASTALEX_CUDA_ARCHITECTURES  // such as "80,90+PTX": what nvcc compiled the kernels for
  m.def("architectures() -> str");
#endif
}

// For every device: a CPU tensor then meets check_cuda's sentence, not the dispatcher's.
FASTALEX_LIBRARY_IMPL(FASTALEX_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("lrn", TORCH_BOX(&fastalex::lrn_op));
  m.impl("lrn_backward", TORCH_BOX(&fastalex::lrn_backward_op));
  m.impl("max_pool", TORCH_BOX(&fastalex::max_pool_op));
  m.impl("max_pool_backward", TORCH_BOX(&fastalex::max_pool_backward_op));
  m.impl("lrn_max_pool", TORCH_BOX(&fastalex::lrn_max_pool_op));
  m.impl("lrn_max_pool_backward", TORCH_BOX(&fastalex::lrn_max_pool_backward_op));
#ifdef FASTALEX_CUDA_ARCHITECTURES
  m.impl("architectures", TORCH_BOX(&fastalex::architectures_op));
#endif
}
