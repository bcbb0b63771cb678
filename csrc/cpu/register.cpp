// The CPU library's operators as torch sees them: fastalex_cpu::*, written against the stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "activation.h"
#include "kept_memory.h"
#include "library.h"
#include "numbers.h"
#include "pool_numbers.h"

namespace fastalex::cpu {
namespace {

int32_t offsets_dtype(const PoolParams& pool) {
  return pool.taps() <= 256 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int32();
}

// Throws unless a gradient matches the tensor it belongs to in dtype and in its first `dims` sizes.
void require_like(const Tensor& grad, const Tensor& tensor, int64_t dims) {
  require(dtype_code(grad) == dtype_code(tensor) && grad.dim() == tensor.dim(),
          "the gradient differs from the input in dtype or rank");
  for (int64_t d = 0; d < dims; ++d) {
    require(grad.sizes()[d] == tensor.sizes()[d], "the gradient differs from the input in dim ", d);
  }
}

Tensor lrn(const Tensor& input, const Tensor& packed) {
  Numbers numbers(packed, kLrnNumbers);
  const Activation in = read(input);
  const LrnParams lrn = take_lrn(numbers, in.map.channels);
  const DType dtype = dtype_of(input);
  Activation out = create(dtype_code(input), input.sizes(), in.map.channels_last);
  if (input.numel() > 0) kernels().lrn({dtype, lrn, in.map, out.map});
  return std::move(out.tensor);
}

Tensor lrn_backward(const Tensor& grad, const Tensor& input, const Tensor& packed) {
  Numbers numbers(packed, kLrnNumbers);
  require_like(grad, input, input.dim());
  const Activation in = read(input);
  const LrnParams lrn = take_lrn(numbers, in.map.channels);
  const DType dtype = dtype_of(input);
  const Activation g = read_as(grad, in.map.channels_last);
  Activation out = create(dtype_code(input), input.sizes(), in.map.channels_last);
  if (input.numel() > 0) kernels().lrn_backward({dtype, lrn, g.map, in.map, out.map});
  return std::move(out.tensor);
}

// Checks a pool over `in` and allocates its output.
Activation create_pooled(const Tensor& input, const Activation& in, const PoolParams& pool,
                         bool ceil_mode) {
  require(input.dim() == 4, "pooling takes [N, C, H, W]");
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

// A pool ready to run; offsets stay empty where nobody wants them.
struct Pooling {
  Activation in, out, offsets;
  MaxPoolCall call;
};

Pooling create_pooling(const Tensor& input, const PoolParams& pool, bool ceil_mode,
                       bool save_offsets) {
  Pooling p;
  p.in = read(input);
  const DType dtype = dtype_of(input);
  p.out = create_pooled(input, p.in, pool, ceil_mode);
  if (save_offsets) p.offsets = create_offsets(p.out, pool);
  p.call = {dtype, pool, p.in.map, p.out.map, p.offsets.map};
  return p;
}

Pooling run_max_pool(const Tensor& input, const Tensor& packed, bool save_offsets) {
  Numbers numbers(packed, kPoolNumbers + 1);
  const PoolParams pool = take_pool(numbers);
  Pooling p = create_pooling(input, pool, numbers.integer() != 0, save_offsets);
  if (p.out.tensor.numel() > 0) kernels().max_pool(p.call);
  return p;
}

Tensor max_pool_inference(const Tensor& input, const Tensor& packed) {
  return run_max_pool(input, packed, false).out.tensor;
}

std::tuple<Tensor, Tensor> max_pool(const Tensor& input, const Tensor& packed) {
  Pooling p = run_max_pool(input, packed, true);
  return {std::move(p.out.tensor), std::move(p.offsets.tensor)};
}

// Gradients of an input [N, C, height, width] whose layout is the offsets' own.
struct Unpooling {
  Activation grad, offsets, grad_input;
};

Unpooling create_unpooling(const Tensor& grad, const Tensor& offsets, int64_t height, int64_t width,
                           const PoolParams& pool, bool channels_last) {
  require(grad.dim() == 4 && offsets.dim() == 4, "pooling takes [N, C, H, W]");
  require(dtype_code(offsets) == offsets_dtype(pool), "offsets of the wrong dtype");
  for (int d = 0; d < 4; ++d) {
    require(grad.sizes()[d] == offsets.sizes()[d], "the gradient and the offsets differ in shape");
  }
  // Whether the last window was rounded up is not known here: either count will do.
  const auto fits = [](int64_t windows, int64_t size, int64_t kernel, int64_t stride,
                       int64_t padding, int64_t dilation) {
    return windows == pooled_size(size, kernel, stride, padding, dilation, true) ||
           windows == pooled_size(size, kernel, stride, padding, dilation, false);
  };
  require(fits(grad.sizes()[2], height, pool.kernel_h, pool.stride_h, pool.padding_h,
               pool.dilation_h) &&
              fits(grad.sizes()[3], width, pool.kernel_w, pool.stride_w, pool.padding_w,
                   pool.dilation_w),
          "the gradient is not of a pool over ", height, " x ", width);
  const int64_t sizes[] = {grad.sizes()[0], grad.sizes()[1], height, width};
  return {read_as(grad, channels_last), read_as(offsets, channels_last),
          create(dtype_code(grad), Sizes(sizes, 4), channels_last)};
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& offsets, const Tensor& packed) {
  Numbers numbers(packed, kPoolNumbers + 2);
  const PoolParams pool = take_pool(numbers);
  const int64_t height = numbers.integer(), width = numbers.integer();
  const bool channels_last = read(offsets).map.channels_last;
  Unpooling u = create_unpooling(grad, offsets, height, width, pool, channels_last);
  const DType dtype = dtype_of(grad);
  if (u.grad_input.tensor.numel() > 0) {
    kernels().max_pool_backward({dtype, pool, u.grad.map, u.offsets.map, u.grad_input.map});
  }
  return std::move(u.grad_input.tensor);
}

Pooling run_lrn_max_pool(const Tensor& input, const Tensor& packed, bool save_offsets) {
  Numbers numbers(packed, kLrnNumbers + kPoolNumbers + 1);
  const LrnParams lrn = take_lrn(numbers, read(input).map.channels);
  const PoolParams pool = take_undilated_pool(numbers);
  Pooling p = create_pooling(input, pool, numbers.integer() != 0, save_offsets);
  if (p.out.tensor.numel() > 0) kernels().lrn_max_pool({lrn, p.call});
  return p;
}

Tensor lrn_max_pool_inference(const Tensor& input, const Tensor& packed) {
  return run_lrn_max_pool(input, packed, false).out.tensor;
}

std::tuple<Tensor, Tensor> lrn_max_pool(const Tensor& input, const Tensor& packed) {
  Pooling p = run_lrn_max_pool(input, packed, true);
  return {std::move(p.out.tensor), std::move(p.offsets.tensor)};
}

Tensor lrn_max_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& offsets,
                             const Tensor& packed) {
  Numbers numbers(packed, kLrnNumbers + kPoolNumbers);
  require(input.dim() == 4, "pooling takes [N, C, H, W]");
  const Activation in = read(input);
  require_like(grad, input, 2);
  const LrnParams lrn = take_lrn(numbers, in.map.channels);
  const PoolParams pool = take_undilated_pool(numbers);
  Unpooling u =
      create_unpooling(grad, offsets, in.map.height, in.map.width, pool, in.map.channels_last);
  const DType dtype = dtype_of(input);
  if (u.grad_input.tensor.numel() > 0) {
    kernels().lrn_max_pool_backward(
        {lrn, in.map, {dtype, pool, u.grad.map, u.offsets.map, u.grad_input.map}});
  }
  return std::move(u.grad_input.tensor);
}

}  // namespace
}  // namespace fastalex::cpu

// numbers, in this order:
//   of lrn: size, scale, beta, k, groups;
//   of a pool: kernel, stride, padding and dilation, each height first.
STABLE_TORCH_LIBRARY(fastalex_cpu, m) {
  m.def("isa() -> str");
  m.def("available_isas() -> str");
  m.def("set_isa(str name) -> ()");
  m.def("set_poison(bool enabled) -> ()");
  m.def("kept_memory_bytes() -> int");
  m.def("kept_memory_limit() -> int");
  m.def("release_kept_memory() -> ()");
  m.def("lrn(Tensor input, Tensor numbers) -> Tensor");
  m.def("lrn_backward(Tensor grad, Tensor input, Tensor numbers) -> Tensor");
  // The pool, and ceil_mode.
  m.def("max_pool_inference(Tensor input, Tensor numbers) -> Tensor");
  m.def("max_pool(Tensor input, Tensor numbers) -> (Tensor, Tensor)");
  // The pool, and the input's height and width.
  m.def("max_pool_backward(Tensor grad, Tensor offsets, Tensor numbers) -> Tensor");
  // lrn, the pool, and ceil_mode.
  m.def("lrn_max_pool_inference(Tensor input, Tensor numbers) -> Tensor");
  m.def("lrn_max_pool(Tensor input, Tensor numbers) -> (Tensor, Tensor)");
  // lrn, and the pool.
  m.def(
      "lrn_max_pool_backward(Tensor grad, Tensor input, Tensor offsets, Tensor numbers) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fastalex::cpu::isa));
  m.impl("available_isas", TORCH_BOX(&fastalex::cpu::available_isas));
  m.impl("set_isa", TORCH_BOX(&fastalex::cpu::set_isa));
  m.impl("set_poison", TORCH_BOX(&fastalex::cpu::set_poison));
  m.impl("kept_memory_bytes", TORCH_BOX(&fastalex::cpu::kept_memory_bytes));
  m.impl("kept_memory_limit", TORCH_BOX(&fastalex::cpu::kept_memory_limit));
  m.impl("release_kept_memory", TORCH_BOX(&fastalex::cpu::release_kept_memory));
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
