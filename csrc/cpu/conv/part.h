// A plan's unit of work: one geometry, the engine chosen for it and its blocking.
#pragma once
#include <memory>

#include "geometry.h"

namespace fastalex::cpu::conv {

inline constexpr size_t kAlignment = 64;

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Floats of one finished image under a sink.
inline int64_t image_floats(const Geometry& g) {
  return int64_t{g.groups} * g.filters * g.out_height * g.out_width;
}

inline constexpr size_t align_up(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// kPrivate: a worker transforms, multiplies and writes one block of tiles at a time; its inputs
// stay in its L2. kShared: all workers transform a block of images, then share out the panels of
// filters; each weight is read once.
enum class Schedule : int { kPrivate, kShared };

struct WinogradChoice {
  const WinogradKernels* kernels = nullptr;
  Cover rows, columns;
  Schedule schedule = Schedule::kPrivate;
  int64_t images_per_block = 1;
  int rows_per_block = 0;  // tile rows; all of them unless images_per_block is 1
};

struct DirectChoice {
  int rows_per_band = 1;
  int64_t pixels_per_band = 1;   // where all pixels form one row (1x1 kernels)
  int terms_per_pass = 256;      // inner-product terms whose weights stay in L1
  int filter_splits = 1;         // jobs per band, each with its share of the filters
  int64_t images_per_block = 1;  // of a weight gradient: those prepared together
};

// Space to depth: engine pixel (y, x) gathers the caller's factor x factor pixels from
// (y * factor - offset_h, x * factor - offset_w) as channels.
struct Fold {
  int factor = 1;
  int offset_h = 0, offset_w = 0;
  int height = 0, width = 0, channels = 0;  // of the caller's map, channels per group
};

struct Part {
  Geometry geometry;  // as the engine sees it: folded for Winograd over a strided convolution
  Fold fold;
  WeightMap weights;
  Phase phase;
  Engine engine = Engine::kDirect;
  WinogradChoice winograd;
  DirectChoice direct;
  size_t packed_offset = 0, packed_bytes = 0, scratch_bytes = 0;
  double predicted_seconds = 0;
  bool by_image = false;  // results go to a sink
  bool pairs = false;     // a channel of the geometry is two of the caller's, in bfloat16
  // Serves tiles that hold NaN or infinity, when they are many.
  std::unique_ptr<Part> fallback;
};

// What a part reads and writes, in the caller's layout.
struct Operands {
  DType dtype;
  ConstTensor input;
  ConstTensor mask;  // data null: none
  ConstTensor weight;
  Tensor output;
  const float* packed;
  const void* bias;
  bool relu;
  char* scratch;
  int threads;
  ImageSink sink;
  ConstTensor residual;      // added to the output before its ReLU; data null: none
  const Prologue* prologue;  // null: none

  // Whether the ReLU comes right after the bias, inside the kernels.
  bool relu_in_kernel() const { return relu && !residual.data; }
};

struct GradientOperands {
  DType dtype;
  ConstTensor input;
  ConstTensor gradient;
  ConstTensor mask;
  Tensor weight_gradient;
  void* bias_gradient;
  char* scratch;
  int threads;
};

// Fills in blocking, packed_bytes and scratch_bytes of a part whose geometry and engine are set.
void block_winograd(const ConvKernels& kernels, Part& part, int threads);
void block_direct(const ConvKernels& kernels, Part& part, int threads);
// The same for a weight gradient; blocking does not depend on threads, so neither do the sums.
void block_winograd_gradient(const ConvKernels& kernels, Part& part, int threads);
void block_direct_gradient(const ConvKernels& kernels, Part& part, int threads);

void pack_winograd(const ConvKernels& kernels, const Part& part, DType dtype,
                   const ConstTensor& weight, float* packed);
void pack_direct(const ConvKernels& kernels, const Part& part, DType dtype,
                 const ConstTensor& weight, float* packed);

void run_winograd(const ConvKernels& kernels, const Part& part, const Operands& operands);
void run_direct(const ConvKernels& kernels, const Part& part, const Operands& operands);

void run_winograd_weight_gradient(const ConvKernels& kernels, const Part& part,
                                  const GradientOperands& operands);
void run_direct_weight_gradient(const ConvKernels& kernels, const Part& part,
                                const GradientOperands& operands);

}  // namespace fastalex::cpu::conv
