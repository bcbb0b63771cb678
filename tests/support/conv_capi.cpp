// The convolution engine behind C functions, for tests and benchmarks through ctypes.
#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cpu/conv/conv.h"
#include "../../csrc/cpu/conv/isa_tables.h"
#include "../../csrc/cpu/linear.h"

namespace cpu = fastalex::cpu;
namespace conv = fastalex::cpu::conv;
namespace linear = fastalex::cpu::linear;

namespace {

const conv::ConvKernels& kernels_of(int isa) {
  return isa == 2   ? cpu::avx512::conv_kernels()
         : isa == 1 ? cpu::avx2::conv_kernels()
                    : cpu::portable::conv_kernels();
}

conv::Strides strides_of(const int64_t* s) { return {s[0], s[1], s[2], s[3]}; }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

extern "C" {

// sizes: batch groups in_c in_h in_w out_c kh kw sh sw ph pw dh dw
void* conv_plan(int isa, int pass, int threads, int engine, int tile, int dtype, int precision,
                int relu, int by_image, const int* sizes) {
  conv::Problem p;
  p.dtype = static_cast<cpu::DType>(dtype);
  p.precision = static_cast<conv::Precision>(precision);
  p.relu = relu != 0;
  p.by_image = by_image != 0;
  p.batch = sizes[0];
  int* const fields[] = {&p.groups,        &p.in_channels,    &p.in_height,     &p.in_width,
                         &p.out_channels,  &p.kernel_height,  &p.kernel_width,  &p.stride_height,
                         &p.stride_width,  &p.padding_height, &p.padding_width, &p.dilation_height,
                         &p.dilation_width};
  for (int i = 0; i < 13; ++i) *fields[i] = sizes[i + 1];
  return new conv::Plan(kernels_of(isa), p, static_cast<conv::Pass>(pass), threads,
                        static_cast<conv::Engine>(engine), tile);
}
void conv_free(void* plan) { delete static_cast<conv::Plan*>(plan); }

size_t conv_packed_bytes(void* plan) { return static_cast<conv::Plan*>(plan)->packed_bytes(); }
size_t conv_scratch_bytes(void* plan) { return static_cast<conv::Plan*>(plan)->scratch_bytes(); }
double conv_predicted(void* plan) { return static_cast<conv::Plan*>(plan)->predicted_seconds(); }
int conv_engine(void* plan) { return static_cast<int>(static_cast<conv::Plan*>(plan)->engine()); }
void conv_explain(void* plan, char* text, size_t size) {
  std::strncpy(text, static_cast<conv::Plan*>(plan)->explain().c_str(), size - 1);
}

// A buffer in 2 MiB pages where the system grants them.
void* conv_buffer(size_t bytes) {
  constexpr size_t kPage = 2 << 20;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  void* data = std::aligned_alloc(kPage, bytes);
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}
void conv_buffer_free(void* data) { std::free(data); }

double conv_pack(void* plan, const void* weight, const int64_t* strides, void* packed) {
  const auto start = std::chrono::steady_clock::now();
  static_cast<conv::Plan*>(plan)->pack({weight, strides_of(strides)}, packed);
  return seconds_since(start);
}

double conv_forward(void* plan, const void* input, const int64_t* input_strides, const void* weight,
                    const int64_t* weight_strides, const void* bias, const void* packed,
                    void* output, const int64_t* output_strides, void* scratch,
                    int64_t image_floats) {
  // Under by_image the sink copies each finished image to its place in a dense output.
  struct Copy {
    float* output;
    int64_t floats;
  } copy{static_cast<float*>(output), image_floats};
  const conv::ImageSink sink{[](void* context, int, int64_t image, const float* data) {
                               const Copy& to = *static_cast<Copy*>(context);
                               std::memcpy(to.output + image * to.floats, data,
                                           to.floats * sizeof(float));
                             },
                             &copy};
  const auto start = std::chrono::steady_clock::now();
  static_cast<conv::Plan*>(plan)->forward({{input, strides_of(input_strides)},
                                           {weight, strides_of(weight_strides)},
                                           bias,
                                           packed,
                                           {output, strides_of(output_strides)},
                                           scratch,
                                           sink});
  return seconds_since(start);
}

double conv_input_gradient(void* plan, const void* gradient, const int64_t* gradient_strides,
                           const void* output, const int64_t* output_strides, const void* weight,
                           const int64_t* weight_strides, const void* packed, void* result,
                           const int64_t* result_strides, void* scratch) {
  const auto start = std::chrono::steady_clock::now();
  static_cast<conv::Plan*>(plan)->input_gradient({{gradient, strides_of(gradient_strides)},
                                                  {output, strides_of(output_strides)},
                                                  {weight, strides_of(weight_strides)},
                                                  packed,
                                                  {result, strides_of(result_strides)},
                                                  scratch});
  return seconds_since(start);
}

double conv_weight_gradient(void* plan, const void* gradient, const int64_t* gradient_strides,
                            const void* output, const int64_t* output_strides, const void* input,
                            const int64_t* input_strides, void* result,
                            const int64_t* result_strides, void* bias_gradient, void* scratch) {
  const auto start = std::chrono::steady_clock::now();
  static_cast<conv::Plan*>(plan)->weight_gradient({{gradient, strides_of(gradient_strides)},
                                                   {output, strides_of(output_strides)},
                                                   {input, strides_of(input_strides)},
                                                   {result, strides_of(result_strides)},
                                                   bias_gradient,
                                                   scratch});
  return seconds_since(start);
}

void* linear_plan(int isa, int dtype, int64_t rows, int inputs, int outputs, int relu,
                  int threads) {
  return new linear::Plan(
      kernels_of(isa), {static_cast<cpu::DType>(dtype), rows, inputs, outputs, relu != 0}, threads);
}
void linear_free(void* plan) { delete static_cast<linear::Plan*>(plan); }
size_t linear_forward_scratch_bytes(void* plan) {
  return static_cast<linear::Plan*>(plan)->forward_scratch_bytes();
}
size_t linear_backward_scratch_bytes(void* plan) {
  return static_cast<linear::Plan*>(plan)->backward_scratch_bytes();
}
double linear_forward(void* plan, const void* input, const void* weight, const void* bias,
                      void* output, void* scratch) {
  const auto start = std::chrono::steady_clock::now();
  static_cast<linear::Plan*>(plan)->forward({input, weight, bias, output, scratch});
  return seconds_since(start);
}
double linear_backward(void* plan, const void* gradient, const void* output, const void* input,
                       const void* weight, void* input_gradient, void* weight_gradient,
                       void* bias_gradient, void* scratch) {
  const auto start = std::chrono::steady_clock::now();
  static_cast<linear::Plan*>(plan)->backward(
      {gradient, output, input, weight, input_gradient, weight_gradient, bias_gradient, scratch});
  return seconds_since(start);
}

}  // extern "C"
