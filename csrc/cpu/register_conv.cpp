// The convolution operators as torch sees them: fastalex_cpu::conv_relu and its gradients, on the
// engine in conv/. Stable ABI only.
#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "conv/scalar.h"
#include "conv_call.h"
#include "kept_memory.h"
#include "library.h"
#include "parallel.h"

namespace fastalex::cpu {
namespace {

using conv::ConstTensor;
using conv::Pass;
using conv::Plan;
using conv::Problem;

std::atomic<int> g_precision{static_cast<int>(conv::Precision::kHigh)};
// What tests force; kAuto and 0 leave the choice to the cost model.
std::atomic<int> g_engine{static_cast<int>(conv::Engine::kAuto)}, g_tile{0};

int narrow(int64_t value) {
  constexpr int64_t kLimit = int64_t{1} << 30;  // sums of two fit an int
  require(value >= 0 && value < kLimit, "a convolution's sizes lie between 0 and 2^30, got ",
          value);
  return static_cast<int>(value);
}

struct Geometry {
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
};

Geometry take_geometry(Numbers& numbers) {
  const auto next = [&] { return numbers.integer(); };
  return {next(), next(), next(), next(), next(), next(), next()};
}

// Throws unless the numbers describe a convolution that the engine computes.
Problem problem_of(DType dtype, const int64_t* input, const int64_t* weight, const Geometry& g) {
  require(g.groups > 0 && input[1] == weight[1] * g.groups && weight[0] % g.groups == 0,
          "input has ", input[1], " channels; weight [", weight[0], ", ", weight[1], ", ",
          weight[2], ", ", weight[3], "] in ", g.groups, " groups takes ", weight[1] * g.groups,
          ", and its first size must be a multiple of the groups");
  require(g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 && g.dilation_w > 0,
          "convolutions take positive strides and dilations");
  Problem p;
  p.dtype = dtype;
  p.batch = input[0];
  p.groups = narrow(g.groups);
  p.in_channels = narrow(input[1]);
  p.in_height = narrow(input[2]);
  p.in_width = narrow(input[3]);
  p.out_channels = narrow(weight[0]);
  p.kernel_height = narrow(weight[2]);
  p.kernel_width = narrow(weight[3]);
  p.stride_height = narrow(g.stride_h);
  p.stride_width = narrow(g.stride_w);
  p.padding_height = narrow(g.padding_h);
  p.padding_width = narrow(g.padding_w);
  p.dilation_height = narrow(g.dilation_h);
  p.dilation_width = narrow(g.dilation_w);
  p.precision = static_cast<conv::Precision>(g_precision.load(std::memory_order_relaxed));
  narrow(g.dilation_h * (weight[2] - 1) + 2 * g.padding_h + input[2]);
  narrow(g.dilation_w * (weight[3] - 1) + 2 * g.padding_w + input[3]);
  require(p.in_channels > 0 && p.out_channels > 0 && p.in_height > 0 && p.in_width > 0 &&
              p.kernel_height > 0 && p.kernel_width > 0,
          "only the batch of a convolution can be empty");
  const std::string refusal = conv::refusal(p);
  require(refusal.empty(), refusal);
  return p;
}

Problem problem_of(const Tensor& input, const Tensor& weight, const Geometry& g) {
  require(input.is_cpu() && weight.is_cpu(), "the CPU kernels take CPU tensors");
  require(input.dim() == 4 && weight.dim() == 4,
          "convolutions take input [N, C, H, W] and weight [K, C / groups, R, S]");
  require(dtype_code(input) == dtype_code(weight), "input and weight differ in dtype");
  return problem_of(dtype_of(input), input.sizes().data(), weight.sizes().data(), g);
}

WeightBytes bytes_of(const Tensor& weight) {
  return {weight.data_ptr(), static_cast<int64_t>(weight.numel() * weight.element_size())};
}

}  // namespace

namespace {

bool pairs_fit(const Problem& problem) {
  return problem.dtype == DType::kBFloat16 && problem.in_channels / problem.groups % 2 == 0;
}

// Every pixel begins where a pair of bfloat16 may be read as a float.
bool pairs_lie_well(const Tensor& input) {
  const auto s = input.strides();
  return (s[0] | s[2] | s[3]) % 2 == 0 && reinterpret_cast<uintptr_t>(input.data_ptr()) % 4 == 0;
}

}  // namespace

std::shared_ptr<const Plan> plan_of(const Problem& problem, Pass pass) {
  return plan_for(problem, pass,
                  static_cast<conv::Engine>(g_engine.load(std::memory_order_relaxed)),
                  g_tile.load(std::memory_order_relaxed));
}

Problem conv_problem(const Tensor& input, const Tensor& weight, Numbers& numbers) {
  Problem problem = problem_of(input, weight, take_geometry(numbers));
  problem.pairs = pairs_fit(problem) && input.strides()[1] == 1 && pairs_lie_well(input);
  return problem;
}

std::optional<Tensor> channel_row(const std::optional<Tensor>& row, const char* name,
                                  const Tensor& input, const Tensor& weight) {
  if (!row) return std::nullopt;
  require(row->is_cpu() && row->dim() == 1 && row->sizes()[0] == weight.sizes()[0] &&
              dtype_code(*row) == dtype_code(input),
          name, " is one value of the input's dtype for each output channel");
  return torch::stable::contiguous(*row);
}

ConstTensor conv_view(const Tensor& tensor) {
  const auto s = tensor.strides();
  return {tensor.data_ptr(), {s[0], s[1], s[2], s[3]}};
}

std::shared_ptr<const Buffer> packed_weights(const Plan& plan, DType dtype, const Tensor& weight) {
  uint64_t layout = plan.packed_key();
  const ConstTensor from = conv_view(weight);
  const conv::Strides& s = from.strides;
  for (int64_t value : {static_cast<int64_t>(dtype), s.n, s.c, s.h, s.w}) {
    layout = (layout ^ static_cast<uint64_t>(value)) * 0x100000001b3u;
  }
  return packed_weight(bytes_of(weight), layout, plan.packed_bytes(),
                       [&](void* out) { plan.pack(from, out); });
}

namespace {

conv::Tensor target(const Tensor& tensor) {
  const auto s = tensor.strides();
  return {tensor.mutable_data_ptr(), {s[0], s[1], s[2], s[3]}};
}

Tensor create_like(const Tensor& like, const int64_t (&sizes)[4]) {
  return create(dtype_code(like), Sizes(sizes, 4), is_channels_last(like)).tensor;
}

Tensor create_vector(const Tensor& like, int64_t size) {
  const int64_t stride = 1;
  return empty_strided(dtype_code(like), Sizes(&size, 1), Sizes(&stride, 1));
}

// The packed weights of a convolution, and the weight they were made from.
struct Weights {
  std::shared_ptr<const Buffer> packed;
  ConstTensor dense;
};

// `weight` times `scale` by output channel, packed; the product is kept behind the packed form.
Weights scaled_weights(const Plan& plan, const Tensor& weight, const Tensor& scale) {
  const ConstTensor from = conv_view(weight);
  const conv::Strides& s = from.strides;
  const size_t offset = (plan.packed_bytes() + 63) / 64 * 64;
  std::array<uint64_t, 2> content;
  const auto sizes = weight.sizes();
  kernels().fingerprint(scale.data_ptr(), sizes[0] * sizeof(float), content.data());
  uint64_t layout = plan.packed_key() ^ content[0];
  for (int64_t value : {s.n, s.c, s.h, s.w}) {
    layout = (layout ^ static_cast<uint64_t>(value)) * 0x100000001b3u;
  }
  const auto* w = static_cast<const float*>(from.data);
  const auto* by = static_cast<const float*>(scale.data_ptr());
  auto packed = packed_weight(
      bytes_of(weight), layout, offset + weight.numel() * sizeof(float), [&](void* out) {
        auto* product = reinterpret_cast<float*>(static_cast<char*>(out) + offset);
        for (int64_t k = 0; k < sizes[0]; ++k) {
          for (int64_t c = 0; c < sizes[1]; ++c) {
            for (int64_t h = 0; h < sizes[2]; ++h) {
              for (int64_t x = 0; x < sizes[3]; ++x) {
                const int64_t at = k * s.n + c * s.c + h * s.h + x * s.w;
                product[at] = w[at] * by[k];
              }
            }
          }
        }
        plan.pack({product, s}, out);
      });
  const void* product = static_cast<const char*>(packed->data()) + offset;
  return {std::move(packed), {product, s}};
}

// `input` gives the output's dtype and layout, and where there is no prologue the values.
Tensor forward(Problem problem, const Tensor& input, const Tensor& weight,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, const conv::Prologue* prologue = nullptr) {
  const std::optional<Tensor> scale_row = channel_row(scale, "scale", input, weight),
                              bias_row = channel_row(bias, "bias", input, weight);
  require(!scale || problem.dtype == DType::kFloat32, "scale takes float32");
  const Tensor output = create_like(
      input, {problem.batch, problem.out_channels, problem.out_height(), problem.out_width()});
  require(!residual || (residual->is_cpu() && residual->dim() == 4 &&
                        std::equal(output.sizes().begin(), output.sizes().end(),
                                   residual->sizes().begin()) &&
                        dtype_code(*residual) == dtype_code(input)),
          "residual has the output's sizes and the input's dtype");
  if (problem.batch == 0) return output;
  const std::shared_ptr<const Plan> plan = plan_of(problem, Pass::kForward);
  const Tensor dense = dense_weight(weight);
  const Weights weights =
      scale_row ? scaled_weights(*plan, dense, *scale_row)
                : Weights{packed_weights(*plan, problem.dtype, dense), conv_view(dense)};
  const ScratchLease scratch(plan->scratch_bytes());
  plan->forward({conv_view(input),
                 weights.dense,
                 bias_row ? bias_row->data_ptr() : nullptr,
                 weights.packed->data(),
                 target(output),
                 scratch.data(),
                 {},
                 residual ? conv_view(*residual) : ConstTensor{},
                 prologue});
  return output;
}

Tensor conv_relu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 const Tensor& packed_numbers) {
  Numbers numbers(packed_numbers, kGeometryNumbers);
  return forward(conv_problem(input, weight, numbers), input, weight, std::nullopt, bias,
                 std::nullopt);
}

Tensor conv_inference(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                      const Tensor& packed_numbers) {
  Numbers numbers(packed_numbers, kGeometryNumbers + 1);
  Problem problem = conv_problem(input, weight, numbers);
  problem.relu = numbers.integer() != 0;
  return forward(problem, input, weight, scale, bias, residual);
}

// conv2d(relu(concatenation of inputs * gain + shift), weight * scale) + bias, perhaps through
// ReLU.
Tensor conv_normalized(std::vector<Tensor> inputs, const Tensor& gain, const Tensor& shift,
                       const Tensor& weight, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& bias, const Tensor& packed_numbers) {
  Numbers numbers(packed_numbers, kGeometryNumbers + 2);
  STD_TORCH_CHECK(!inputs.empty(), "fastalex: conv_normalized takes one input or more");
  const Tensor& first = inputs.front();
  int64_t sizes[4] = {};
  conv::Prologue prologue;
  for (const Tensor& input : inputs) {
    STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && dtype_code(input) == dtype_code(first) &&
                        input.sizes()[0] == first.sizes()[0] &&
                        input.sizes()[2] == first.sizes()[2] &&
                        input.sizes()[3] == first.sizes()[3],
                    "fastalex: inputs are CPU maps of one dtype that differ in channels alone");
    prologue.pieces.push_back({conv_view(input), narrow(input.sizes()[1])});
    sizes[1] += input.sizes()[1];
  }
  for (int d : {0, 2, 3}) sizes[d] = first.sizes()[d];
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 4 && dtype_code(weight) == dtype_code(first),
                  "fastalex: weight is [K, C / groups, R, S] on the CPU, in the inputs' dtype");
  const Geometry geometry = take_geometry(numbers);
  Problem problem = problem_of(dtype_of(first), sizes, weight.sizes().data(), geometry);
  for (const Tensor* row : {&gain, &shift}) {
    STD_TORCH_CHECK(row->is_cpu() && row->is_contiguous() && row->dim() == 1 &&
                        row->sizes()[0] == sizes[1] && dtype_of(*row) == DType::kFloat32,
                    "fastalex: gain and shift are one float32 for each input channel");
  }
  prologue.gain = static_cast<const float*>(gain.data_ptr());
  prologue.shift = static_cast<const float*>(shift.data_ptr());
  prologue.relu = numbers.integer() != 0;
  problem.relu = numbers.integer() != 0;
  return forward(problem, first, weight, scale, bias, std::nullopt, &prologue);
}

Tensor input_gradient(const Problem& problem, const Tensor& grad, const Tensor& output,
                      const Tensor& input, const Tensor& weight) {
  const Tensor result =
      create_like(input, {problem.batch, problem.in_channels, problem.in_height, problem.in_width});
  if (problem.batch == 0) return result;
  const std::shared_ptr<const Plan> plan = plan_of(problem, Pass::kInputGradient);
  const Tensor dense = dense_weight(weight);
  const std::shared_ptr<const Buffer> packed = packed_weights(*plan, problem.dtype, dense);
  const ScratchLease scratch(plan->scratch_bytes());
  plan->input_gradient({conv_view(grad), conv_view(output), conv_view(dense), packed->data(),
                        target(result), scratch.data()});
  return result;
}

// The sum of each output channel's gradient, where nobody wants the weight's with it: an image at a
// time, the images in their order, whatever the threads.
void bias_gradient(const Problem& problem, const Tensor& grad, const Tensor& output, void* sums) {
  const int64_t channels = problem.out_channels, width = problem.out_width();
  const ConstTensor g = conv_view(grad), mask = conv_view(output);
  std::vector<double> by_image(problem.batch * channels, 0.0);
  parallel_for(problem.batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(width * channels);
    for (int64_t n = begin; n < end; ++n) {
      double* total = by_image.data() + n * channels;
      for (int64_t y = 0; y < problem.out_height(); ++y) {
        conv::GatherCall call{};
        const auto row_of = [&](const ConstTensor& t) {
          return conv::element_at(t.data, problem.dtype, n * t.strides.n + y * t.strides.h);
        };
        call.data = row_of(g);
        call.dtype = problem.dtype;
        call.pixel_stride = g.strides.w;
        call.channel_stride = g.strides.c;
        call.mask = row_of(mask);
        call.mask_pixel_stride = mask.strides.w;
        call.mask_channel_stride = mask.strides.c;
        call.pixels = width;
        call.channels = call.padded_channels = problem.out_channels;
        call.out = row.data();
        call.out_stride = channels;
        kernels().conv().gather(call);
        for (int64_t i = 0; i < width; ++i) {
          for (int64_t c = 0; c < channels; ++c) total[c] += row[i * channels + c];
        }
      }
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t n = 0; n < problem.batch; ++n) sum += by_image[n * channels + c];
    conv::write_element(sums, problem.dtype, c, static_cast<float>(sum));
  }
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_backward(const Tensor& grad, const Tensor& output,
                                                      const Tensor& input, const Tensor& weight,
                                                      const Tensor& packed_numbers) {
  Numbers numbers(packed_numbers, kGeometryNumbers + 3);
  const Problem problem = conv_problem(input, weight, numbers);
  const bool wants_input = numbers.integer() != 0, wants_weight = numbers.integer() != 0,
             wants_bias = numbers.integer() != 0;
  const int64_t expected[] = {problem.batch, problem.out_channels, problem.out_height(),
                              problem.out_width()};
  for (const Tensor* tensor : {&grad, &output}) {
    require(tensor->is_cpu() && tensor->dim() == 4 &&
                std::equal(expected, expected + 4, tensor->sizes().begin()) &&
                dtype_code(*tensor) == dtype_code(input),
            "gradient and output are the convolution's, in the input's dtype");
  }
  Tensor grad_input, grad_weight, grad_bias = create_vector(input, wants_bias ? expected[1] : 0);
  grad_input =
      wants_input ? input_gradient(problem, grad, output, input, weight) : create_vector(input, 0);
  grad_weight = create_vector(input, 0);
  if (wants_bias && !wants_weight) {
    bias_gradient(problem, grad, output, grad_bias.mutable_data_ptr());
  } else if (wants_weight) {
    const auto sizes = weight.sizes();
    Tensor result = create_like(weight, {sizes[0], sizes[1], sizes[2], sizes[3]});
    const std::shared_ptr<const Plan> plan = plan_of(problem, Pass::kWeightGradient);
    const ScratchLease scratch(plan->scratch_bytes());
    plan->weight_gradient({conv_view(grad), conv_view(output), conv_view(input), target(result),
                           wants_bias ? grad_bias.mutable_data_ptr() : nullptr, scratch.data()});
    grad_weight = result;
  }
  return {grad_input, grad_weight, grad_bias};
}

// What the engine would do, in words.
std::string conv_plan(const Tensor& packed_numbers) {
  Numbers numbers(packed_numbers, 2 + 7 + kGeometryNumbers);
  const auto pass = static_cast<Pass>(numbers.integer());
  const auto dtype = static_cast<DType>(numbers.integer());
  int64_t sizes[7];
  for (int64_t& size : sizes) size = numbers.integer();
  const Geometry geometry = take_geometry(numbers);
  const int64_t weight[] = {sizes[4], sizes[1] / std::max<int64_t>(geometry.groups, 1), sizes[5],
                            sizes[6]};
  Problem problem = problem_of(dtype, sizes, weight, geometry);
  problem.pairs = pairs_fit(problem);  // as channels-last inputs have it
  return plan_of(problem, pass)->explain();
}

void set_conv_precision(int64_t level) { g_precision = static_cast<int>(level); }

void force_conv_engine(int64_t engine, int64_t tile) {
  g_engine = static_cast<int>(engine);
  g_tile = static_cast<int>(tile);
}

}  // namespace
}  // namespace fastalex::cpu

// numbers, in this order: stride, padding and dilation, each height first, and groups.
STABLE_TORCH_LIBRARY_FRAGMENT(fastalex_cpu, m) {
  m.def("conv_relu(Tensor input, Tensor weight, Tensor? bias, Tensor numbers) -> Tensor");
  // Then whether a ReLU follows. Inference alone: conv2d(input, weight * scale) + bias + residual.
  m.def(
      "conv_inference(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, "
      "Tensor numbers) -> Tensor");
  // Then whether a ReLU precedes and whether one follows. Inference alone:
  // conv2d(relu(cat(inputs) * gain + shift), weight * scale) + bias.
  m.def(
      "conv_normalized(Tensor[] inputs, Tensor gain, Tensor shift, Tensor weight, Tensor? scale, "
      "Tensor? bias, Tensor numbers) -> Tensor");
  // Then whether the gradients of input, weight and bias are wanted.
  m.def(
      "conv_relu_backward(Tensor grad, Tensor output, Tensor input, Tensor weight, Tensor numbers) "
      "-> (Tensor, Tensor, Tensor)");
  // First the pass (forward, input gradient, weight gradient), the dtype, input [N, C, H, W],
  // output channels, kernel.
  m.def("conv_plan(Tensor numbers) -> str");
  m.def("set_conv_precision(int level) -> ()");
  m.def("force_conv_engine(int engine, int tile) -> ()");
  m.def("release_packed(int address) -> ()");
  m.def("release_all_packed() -> ()");
  m.def("packed_bytes() -> int");
  m.def("packed_limit() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CompositeExplicitAutograd, m) {
  m.impl("conv_plan", TORCH_BOX(&fastalex::cpu::conv_plan));
  m.impl("set_conv_precision", TORCH_BOX(&fastalex::cpu::set_conv_precision));
  m.impl("force_conv_engine", TORCH_BOX(&fastalex::cpu::force_conv_engine));
  m.impl("release_packed", TORCH_BOX(&fastalex::cpu::release_packed));
  m.impl("release_all_packed", TORCH_BOX(&fastalex::cpu::release_all_packed));
  m.impl("packed_bytes", TORCH_BOX(&fastalex::cpu::packed_bytes));
  m.impl("packed_limit", TORCH_BOX(&fastalex::cpu::packed_limit));
}

STABLE_TORCH_LIBRARY_IMPL(fastalex_cpu, CPU, m) {
  m.impl("conv_relu", TORCH_BOX(&fastalex::cpu::conv_relu));
  m.impl("conv_inference", TORCH_BOX(&fastalex::cpu::conv_inference));
  m.impl("conv_normalized", TORCH_BOX(&fastalex::cpu::conv_normalized));
  m.impl("conv_relu_backward", TORCH_BOX(&fastalex::cpu::conv_relu_backward));
}
