// Convolution + bias + ReLU and its gradients on CPUs: plan, pack, run. Free of torch.
//
//   const conv::Plan plan(kernels, problem, conv::Pass::kForward, thread_count());
//   plan.pack(weight, packed);              // packed: plan.packed_bytes(), once per weight version
//   plan.forward({input, weight, bias, packed, output, scratch});
//
// A plan holds no buffers and is immutable: any number of threads may run it at once, each with its
// own scratch. Buffers must be aligned to 64 bytes; large ones gain 10 to 20 % from 2 MiB pages.
// Results are bitwise equal for every number of threads. Packed weights depend on the problem's
// channels, kernel, groups, precision and (through the tile) map size, not on batch or strides:
// two plans with equal packed_key() share them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../dtypes.h"
#include "kernels.h"

namespace fastalex::cpu::conv {

enum class Pass : int { kForward, kInputGradient, kWeightGradient };

// kHighest: direct only. kHigh: Winograd tiles within 1e-5 of float64 (relative, norm). kMedium:
// all.
enum class Precision : int { kHighest, kHigh, kMedium };

enum class Engine : int { kAuto, kDirect, kWinograd };

struct Strides {  // in elements
  int64_t n = 0, c = 0, h = 0, w = 0;
};

struct ConstTensor {
  const void* data = nullptr;
  Strides strides;
};

struct Tensor {
  void* data = nullptr;
  Strides strides;
  operator ConstTensor() const { return {data, strides}; }
};

// The forward convolution that every pass refers to; sizes in elements. All tensors share `dtype`
// (float64 is refused: see refusal()).
struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int groups = 1;
  int in_channels = 0, in_height = 0, in_width = 0;
  int out_channels = 0;
  int kernel_height = 1, kernel_width = 1;
  int stride_height = 1, stride_width = 1;
  int padding_height = 0, padding_width = 0;
  int dilation_height = 1, dilation_width = 1;
  bool relu = true;
  Precision precision = Precision::kHigh;
  // Results go to ForwardCall::sink image by image, for what follows (normalization, pooling) to
  // consume from cache. One worker makes an image: worthwhile from a batch of `threads` on.
  bool by_image = false;
  // bfloat16 whose input's channels lie in adjacent, aligned pairs: direct sums then go by pairs,
  // where the processor multiplies those.
  bool pairs = false;

  int out_height() const {
    return (in_height + 2 * padding_height - dilation_height * (kernel_height - 1) - 1) /
               stride_height +
           1;
  }
  int out_width() const {
    return (in_width + 2 * padding_width - dilation_width * (kernel_width - 1) - 1) / stride_width +
           1;
  }
};

// Why the engine cannot serve the problem, or "" when it can.
std::string refusal(const Problem& problem);

// Receives finished images instead of the output tensor: float, channels last, dense, in the
// scratch of the worker that made it, still in its cache. Called from workers [0, threads), each
// image once. Null data: so many of the image's tiles met NaN that it must be made without a sink.
struct ImageSink {
  void (*image)(void* context, int worker, int64_t image, const float* data) = nullptr;
  void* context = nullptr;
};

// What a forward pass reads in the place of its input: the channels of `pieces` in turn, each value
// through x * gain + shift of its channel, and through ReLU if asked.
struct Prologue {
  struct Piece {
    ConstTensor tensor;
    int channels = 0;
  };
  std::vector<Piece> pieces;
  const float* gain = nullptr;
  const float* shift = nullptr;
  bool relu = false;
};

struct ForwardCall {
  ConstTensor input;  // unused where there is a prologue
  ConstTensor weight;
  const void* bias;  // null: none
  const void* packed;
  Tensor output;  // unused where the problem is by_image
  void* scratch;  // plan.scratch_bytes()
  ImageSink sink;
  // Of the output's sizes, added before the ReLU; data null: none. Not for by_image.
  ConstTensor residual = {};
  const Prologue* prologue = nullptr;
};

struct InputGradientCall {
  ConstTensor gradient;
  ConstTensor output;  // its sign is ReLU's mask; data null: no mask
  ConstTensor weight;
  const void* packed;
  Tensor input_gradient;
  void* scratch;
};

struct WeightGradientCall {
  ConstTensor gradient;
  ConstTensor output;  // as above
  ConstTensor input;
  Tensor weight_gradient;
  void* bias_gradient;  // null: not wanted
  void* scratch;
};

struct Part;

class Plan {
 public:
  // `threads` bounds the workers of a run and sizes its scratch. `engine` forces a choice; a forced
  // engine that cannot serve the problem falls back to kDirect, which always can.
  Plan(const ConvKernels& kernels, const Problem& problem, Pass pass, int threads,
       Engine engine = Engine::kAuto, int tile = 0);
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;
  ~Plan();

  size_t packed_bytes() const;
  size_t scratch_bytes() const;
  uint64_t packed_key() const;
  double predicted_seconds() const;
  Engine engine() const;
  int tile() const;  // the big one of a Winograd plan, or 0
  std::string explain() const;

  void pack(const ConstTensor& weight, void* packed) const;
  void forward(const ForwardCall& call) const;
  void input_gradient(const InputGradientCall& call) const;
  void weight_gradient(const WeightGradientCall& call) const;

 private:
  const ConvKernels* kernels_;
  Problem problem_;
  Pass pass_;
  int threads_;
  std::vector<Part> parts_;
};

}  // namespace fastalex::cpu::conv
