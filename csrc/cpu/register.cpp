// The CPU library's operators as torch sees them: fastalex_cpu::*, written against the stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "activation.h"
#include "library.h"

namespace fastalex::cpu {
namespace {

LrnParams lrn_params(const Map& input, int64_t size, double scale, double beta, double k,
                     int64_t groups) {
  STD_TORCH_CHECK(size > 0, "fastalex: size must be positive, got ", size);
  STD_TORCH_CHECK(groups > 0 && input.channels % groups == 0, "fastalex: ", input.channels,
                  " channels do not divide into ", groups, " groups");
  return {size, groups, scale, beta, k};
}

// Throws unless every number makes sense; the numbers come one by one because lists cost a
// microsecond a call.
PoolParams checked(const PoolParams& pool) {
  STD_TORCH_CHECK(pool.kernel_h > 0 && pool.kernel_w > 0 && pool.stride_h > 0 &&
                      pool.stride_w > 0 && pool.dilation_h > 0 && pool.dilation_w > 0 &&
                      pool.padding_h >= 0 && pool.padding_w >= 0,
                  "fastalex: pooling takes positive kernel, stride and dilation, and padding >= 0");
  STD_TORCH_CHECK(pool.padding_h <= pool.kernel_h / 2 && pool.padding_w <= pool.kernel_w / 2,
                  "fastalex: padding is at most half the kernel");
  constexpr int64_t kLimit = int64_t{1} << 31;  // products of two then fit 64 bits
  STD_TORCH_CHECK(pool.kernel_h < kLimit && pool.kernel_w < kLimit && pool.stride_h < kLimit &&
                      pool.stride_w < kLimit && pool.dilation_h < kLimit &&
                      pool.dilation_w < kLimit,
                  "fastalex: pooling takes kernel, stride and dilation below 2^31");
  return pool;
}

int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  STD_TORCH_CHECK(room >= 0 || (ceil_mode && room > -stride), "fastalex: kernel larger than input");
  int64_t windows = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // ceil_mode drops a last window that starts in the padding beyond the input.
  if (ceil_mode && (windows - 1) * stride >= size + padding) --windows;
  STD_TORCH_CHECK(windows > 0, "fastalex: kernel larger than input");
  return windows;
}

int32_t offsets_dtype(const PoolParams& pool) {
  return pool.taps() <= 256 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int32();
}

// Throws unless a gradient matches the tensor it belongs to in dtype and in its first `dims` sizes.
void require_like(const Tensor& grad, const Tensor& tensor, int64_t dims) {
  STD_TORCH_CHECK(dtype_code(grad) == dtype_code(tensor) && grad.dim() == tensor.dim(),
                  "fastalex: the gradient differs from the input in dtype or rank");
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(grad.sizes()[d] == tensor.sizes()[d],
                    "fastalex: the gradient differs from the input in dim ", d);
  }
}

Tensor lrn(const Tensor& input, int64_t size, double scale, double beta, double k, int64_t groups) {
  const Activation in = read(input);
  const Activation out = create(dtype_code(input), input.sizes(), in.map.channels_last);
  const LrnParams lrn = lrn_params(in.map, size, scale, beta, k, groups);
  const DType dtype = dtype_of(input);
  if (input.numel() > 0) kernels().lrn({dtype, lrn, in.map, out.map});
  return out.tensor;
}

Tensor lrn_backward(const Tensor& grad, const Tensor& input, int64_t size, double scale,
                    double beta, double k, int64_t groups) {
  require_like(grad, input, input.dim());
  const Activation in = read(input);
  const Activation g = read_as(grad, in.map.channels_last);
  const Activation out = create(dtype_code(input), input.sizes(), in.map.channels_last);
  const LrnParams lrn = lrn_params(in.map, size, scale, beta, k, groups);
  const DType dtype = dtype_of(input);
  if (input.numel() > 0) kernels().lrn_backward({dtype, lrn, g.map, in.map, out.map});
  return out.tensor;
}

// Checks a pool over `in` and allocates its output.
Activation create_pooled(const Tensor& input, const Activation& in, const PoolParams& pool,
                         bool ceil_mode) {
  STD_TORCH_CHECK(input.dim() == 4, "fastalex: pooling takes [N, C, H, W]");
  const int64_t sizes[] = {in.map.batch, in.map.channels,
                           pooled_size(in.map.height, pool.kernel_h, pool.stride_h, pool.padding_h,
                                       pool.dilation_h, ceil_mode),
                           pooled_size(in.map.width, pool.kernel_w, pool.stride_w, pool.padding_w,
                                       pool.dilation_w, ceil_mode)};
  return create(dtype_code(input), Sizes(sizes, 4), in.map.channels_last);
}

Activation create_offsets(const Activation& output, const PoolParams& pool) {
  return create(offsets_dtype(pool), output.tensor.sizes(), output.map.channels_last);
}

Tensor max_pool_inference(const Tensor& input, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                          int64_t stride_w, int64_t padding_h, int64_t padding_w,
                          int64_t dilation_h, int64_t dilation_w, bool ceil_mode) {
  const PoolParams pool = checked(
      {kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  const Activation in = read(input), out = create_pooled(input, in, pool, ceil_mode);
  const DType dtype = dtype_of(input);
  if (out.tensor.numel() > 0) kernels().max_pool({dtype, pool, in.map, out.map, Map{}});
  return out.tensor;
}

std::tuple<Tensor, Tensor> max_pool(const Tensor& input, int64_t kernel_h, int64_t kernel_w,
                                    int64_t stride_h, int64_t stride_w, int64_t padding_h,
                                    int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                                    bool ceil_mode) {
  const PoolParams pool = checked(
      {kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  const Activation in = read(input), out = create_pooled(input, in, pool, ceil_mode);
  const Activation offsets = create_offsets(out, pool);
  const DType dtype = dtype_of(input);
  if (out.tensor.numel() > 0) kernels().max_pool({dtype, pool, in.map, out.map, offsets.map});
  return {out.tensor, offsets.tensor};
}

// Gradients of an input [N, C, height, width] whose layout is the offsets' own.
struct Unpooling {
  Activation grad, offsets, grad_input;
};

Unpooling create_unpooling(const Tensor& grad, const Tensor& offsets, int64_t height, int64_t width,
                           const PoolParams& pool, bool channels_last) {
  STD_TORCH_CHECK(grad.dim() == 4 && offsets.dim() == 4, "fastalex: pooling takes [N, C, H, W]");
  STD_TORCH_CHECK(dtype_code(offsets) == offsets_dtype(pool),
                  "fastalex: offsets of the wrong dtype");
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(grad.sizes()[d] == offsets.sizes()[d],
                    "fastalex: the gradient and the offsets differ in shape");
  }
  // Whether the last window was rounded up is not known here: either count will do.
  const auto fits = [](int64_t windows, int64_t size, int64_t kernel, int64_t stride,
                       int64_t padding, int64_t dilation) {
    return windows == pooled_size(size, kernel, stride, padding, dilation, true) ||
           windows == pooled_size(size, kernel, stride, padding, dilation, false);
  };
  STD_TORCH_CHECK(fits(grad.sizes()[2], height, pool.kernel_h, pool.stride_h, pool.padding_h,
                       pool.dilation_h) &&
                      fits(grad.sizes()[3], width, pool.kernel_w, pool.stride_w, pool.padding_w,
                           pool.dilation_w),
                  "fastalex: the gradient is not of a pool over ", height, " x ", width);
  const int64_t sizes[] = {grad.sizes()[0], grad.sizes()[1], height, width};
  return {read_as(grad, channels_last), read_as(offsets, channels_last),
          create(dtype_code(grad), Sizes(sizes, 4), channels_last)};
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& offsets, int64_t height, int64_t width,
                         int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                         int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                         int64_t dilation_w) {
  const PoolParams pool = checked(
      {kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w});
  const bool channels_last = read(offsets).map.channels_last;
  Unpooling u = create_unpooling(grad, offsets, height, width, pool, channels_last);
  const DType dtype = dtype_of(grad);
  if (u.grad_input.tensor.numel() > 0) {
    kernels().max_pool_backward({dtype, pool, u.grad.map, u.offsets.map, u.grad_input.map});
  }
  return u.grad_input.tensor;
}

Tensor lrn_max_pool_inference(const Tensor& input, int64_t size, double scale, double beta,
                              double k, int64_t groups, int64_t kernel_h, int64_t kernel_w,
                              int64_t stride_h, int64_t stride_w, int64_t padding_h,
                              int64_t padding_w, bool ceil_mode) {
  const PoolParams pool =
      checked({kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, 1, 1});
  const Activation in = read(input), out = create_pooled(input, in, pool, ceil_mode);
  const LrnParams lrn = lrn_params(in.map, size, scale, beta, k, groups);
  const DType dtype = dtype_of(input);
  if (out.tensor.numel() > 0) {
    kernels().lrn_max_pool({lrn, {dtype, pool, in.map, out.map, Map{}}});
  }
  return out.tensor;
}

std::tuple<Tensor, Tensor> lrn_max_pool(const Tensor& input, int64_t size, double scale,
                                        double beta, double k, int64_t groups, int64_t kernel_h,
                                        int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                                        int64_t padding_h, int64_t padding_w, bool ceil_mode) {
  const PoolParams pool =
      checked({kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, 1, 1});
  const Activation in = read(input), out = create_pooled(input, in, pool, ceil_mode);
  const Activation offsets = create_offsets(out, pool);
  const LrnParams lrn = lrn_params(in.map, size, scale, beta, k, groups);
  const DType dtype = dtype_of(input);
  if (out.tensor.numel() > 0) {
    kernels().lrn_max_pool({lrn, {dtype, pool, in.map, out.map, offsets.map}});
  }
  return {out.tensor, offsets.tensor};
}

Tensor lrn_max_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& offsets,
                             int64_t size, double scale, double beta, double k, int64_t groups,
                             int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                             int64_t padding_h, int64_t padding_w) {
  const PoolParams pool =
      checked({kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, 1, 1});
  const Activation in = read(input);
  STD_TORCH_CHECK(input.dim() == 4, "fastalex: pooling takes [N, C, H, W]");
  require_like(grad, input, 2);
  const LrnParams lrn = lrn_params(in.map, size, scale, beta, k, groups);
  Unpooling u =
      create_unpooling(grad, offsets, in.map.height, in.map.width, pool, in.map.channels_last);
  const DType dtype = dtype_of(input);
  if (u.grad_input.tensor.numel() > 0) {
    kernels().lrn_max_pool_backward(
        {lrn, in.map, {dtype, pool, u.grad.map, u.offsets.map, u.grad_input.map}});
  }
  return u.grad_input.tensor;
}

}  // namespace
}  // namespace fastalex::cpu

// The geometry of a pool comes number by number: a list argument costs a microsecond a call.
#define POOL_GEOMETRY \
  "int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w"
#define LRN_ARGUMENTS "int size, float scale, float beta, float k, int groups"

STABLE_TORCH_LIBRARY(fastalex_cpu, m) {
  m.def("isa() -> str");
  m.def("available_isas() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("set_poison(bool enabled) -> ()");
  m.def("lrn(Tensor input, " LRN_ARGUMENTS ") -> Tensor");
  m.def("lrn_backward(Tensor grad, Tensor input, " LRN_ARGUMENTS ") -> Tensor");
  m.def("max_pool_inference(Tensor input, " POOL_GEOMETRY
        ", int dilation_h, int dilation_w, bool ceil_mode) -> Tensor");
  m.def("max_pool(Tensor input, " POOL_GEOMETRY
        ", int dilation_h, int dilation_w, bool ceil_mode) -> (Tensor, Tensor)");
  m.def("max_pool_backward(Tensor grad, Tensor offsets, int height, int width, " POOL_GEOMETRY
        ", int dilation_h, int dilation_w) -> Tensor");
  m.def("lrn_max_pool_inference(Tensor input, " LRN_ARGUMENTS ", " POOL_GEOMETRY
        ", bool ceil_mode) -> Tensor");
  m.def("lrn_max_pool(Tensor input, " LRN_ARGUMENTS ", " POOL_GEOMETRY
        ", bool ceil_mode) -> (Tensor, Tensor)");
  m.def("lrn_max_pool_backward(Tensor grad, Tensor input, Tensor offsets, " LRN_ARGUMENTS
        ", " POOL_GEOMETRY ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastalex::cpu::isa));
  m.impl("available_isas", TORCH_BOX(&fastalex::cpu::available_isas));
  m.impl("set_isa", TORCH_BOX(&fastalex::cpu::set_isa));
  m.impl("set_poison", TORCH_BOX(&fastalex::cpu::set_poison));
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CPU, m) {
  m.impl("lrn", TORCH_BOX(&fastalex::cpu::lrn));
  m.impl("lrn_backward", TORCH_BOX(&fastalex::cpu::lrn_backward));
  m.impl("max_pool_inference", TORCH_BOX(&fastalex::cpu::max_pool_inference));
  m.impl("max_pool", TORCH_BOX(&fastalex::cpu::max_pool));
  m.impl("max_pool_backward", TORCH_BOX(&fastalex::cpu::max_pool_backward));
  m.impl("lrn_max_pool_inference", TORCH_BOX(&fastalex::cpu::lrn_max_pool_inference));
  m.impl("lrn_max_pool", TORCH_BOX(&fastalex::cpu::lrn_max_pool));
  m.impl("lrn_max_pool_backward", TORCH_BOX(&fastalex::cpu::lrn_max_pool_backward));
}
