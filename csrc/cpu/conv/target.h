// Where a part's results go: the caller's memory, or scratch that is then converted into it.
#pragma once
#include "part.h"
#include "scalar.h"

namespace fastalex::cpu::conv {

class OutputTarget {
 public:
  OutputTarget(const ConvKernels& kernels, const Part& part, DType dtype, const Tensor& output)
      : kernels_(kernels), part_(part), dtype_(dtype), output_(output) {}
  OutputTarget(const ConvKernels& kernels, const Part& part, const Operands& operands)
      : OutputTarget(kernels, part, operands.dtype, operands.output) {
    residual_ = operands.residual;
    relu_ = operands.relu;
  }

  // One image for a sink: dense, channels last, float, wherever its index.
  static OutputTarget image(const ConvKernels& kernels, const Part& part, float* data) {
    return {kernels, part, DType::kFloat32, {data, image_strides(part.geometry)}};
  }
  static Strides image_strides(const Geometry& g) {
    const int64_t channels = int64_t{g.groups} * g.filters;
    return {0, 1, g.out_width * channels, channels};
  }

  // True when results can be stored to the caller's memory as they are.
  bool in_place() const { return dtype_ == DType::kFloat32 && output_.strides.c == 1; }

  ptrdiff_t pixel_stride() const { return output_.strides.w * part_.phase.step_w; }
  ptrdiff_t row_stride() const { return output_.strides.h * part_.phase.step_h; }

  void* pixel(int64_t image, int group, int filter, int y, int64_t x) const {
    const Strides& s = output_.strides;
    const Phase& phase = part_.phase;
    return element_at(output_.data, dtype_,
                      image * s.n + (int64_t{group} * part_.geometry.filters + filter) * s.c +
                          (phase.first_h + int64_t{y} * phase.step_h) * s.h +
                          (phase.first_w + x * phase.step_w) * s.w);
  }

  // Where there is a residual: adds it to one row of finished sums, data[x * stride + filter -
  // first], while they are in cache, and then does the ReLU.
  void add_residual(int64_t image, int group, int filter, int filters, int y, int64_t x,
                    int64_t pixels, float* data, ptrdiff_t stride) const {
    if (!residual_.data) return;
    const Strides& s = residual_.strides;
    const int64_t channel = int64_t{group} * part_.geometry.filters + filter;
    AddCall call{};
    call.data = element_at(residual_.data, dtype_, image * s.n + channel * s.c + y * s.h + x * s.w);
    call.dtype = dtype_;
    call.pixel_stride = s.w;
    call.channel_stride = s.c;
    call.pixels = pixels;
    call.channels = filters;
    call.relu = relu_;
    call.out = data;
    call.out_stride = stride;
    kernels_.add(call);
  }

  // Converts one row of pixels, data[x * stride + filter - first], into the caller's tensor.
  void write_row(int64_t image, int group, int filter, int filters, int y, int64_t x,
                 int64_t pixels, const float* data, ptrdiff_t stride) const {
    ScatterCall call{};
    call.data = data;
    call.data_stride = stride;
    call.pixels = pixels;
    call.channels = filters;
    call.out = pixel(image, group, filter, y, x);
    call.dtype = dtype_;
    call.pixel_stride = pixel_stride();
    call.channel_stride = output_.strides.c;
    kernels_.scatter(call);
  }

 private:
  const ConvKernels& kernels_;
  const Part& part_;
  DType dtype_;
  Tensor output_;
  ConstTensor residual_;
  bool relu_ = false;
};

}  // namespace fastalex::cpu::conv
