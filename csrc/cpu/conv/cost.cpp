// Predicted time of a part: FLOPs and bytes against rates of a core.
#include "cost.h"

#include <algorithm>

#include "panels.h"
#include "tiles.h"

namespace fastalex::cpu::conv {
namespace {

// Rates of a core; ratios between engines matter, not the absolute values.
constexpr double kClock = 3.5e9;
constexpr double kSharedBytes = 19e9;  // last-level cache or memory, per core

// Steps of a vector a second: a Zen 4 takes its 512-bit vectors in two halves.
double vector_rate(const ConvKernels& kernels) {
#if defined(__x86_64__)
  static const bool halves = __builtin_cpu_is("amdfam19h");
  if (halves && kernels.lanes == 16) return kClock / 2;
#endif
  return kClock;
}

double flops_per_lane(const ConvKernels& kernels) {
  return 4.0 * vector_rate(kernels);  // two fused multiply-adds a cycle
}

constexpr double kProductEfficiency = 0.95;
constexpr double kProductTerms = 5;  // what beginning and ending a block of sums costs, in terms

// A register block with few rows leaves multipliers idle while it waits for its own sums.
double row_efficiency(const ConvKernels& kernels, double rows, int vectors) {
  constexpr double kSumsInFlight = 8;
  const double blocks = static_cast<double>(ceil_div(static_cast<int64_t>(rows), kernels.max_rows));
  const double sums = rows / blocks * vectors;
  return std::min(1.0, sums / kSumsInFlight) * rows / (rows + 0.6 * blocks);
}

double product_seconds(const ConvKernels& kernels, double rows, double terms, double width,
                       double calls, int vectors) {
  const double flops = 2.0 * rows * (terms + kProductTerms) * width * calls;
  return flops / (flops_per_lane(kernels) * kernels.lanes * kProductEfficiency *
                  row_efficiency(kernels, rows, vectors));
}

// Fetching hides behind multiplying, but not all of it.
double overlapped(double multiply, double traffic) {
  constexpr double kExposed = 0.15;
  return std::max(multiply, traffic) + kExposed * std::min(multiply, traffic);
}

double winograd_seconds(const ConvKernels& kernels, const Part& part, int threads) {
  const Geometry& g = part.geometry;
  const WinogradChoice& w = part.winograd;
  const Panels panels{g.filters, kernels.lanes};
  const int points = w.kernels->points, big = w.kernels->big;
  const auto covered = [&](const Cover& c) {
    return double(c.big) * points + double(c.small) * (points - 1);
  };
  const double transformed = covered(w.rows) * covered(w.columns) * g.images * g.groups;
  const double block_rows =
      static_cast<double>(w.images_per_block) * w.rows_per_block * w.columns.tiles();
  const double blocks = transformed / (block_rows * points * points);
  const int vectors = panels.filters > kernels.lanes ? 2 : 1;
  const double multiply = product_seconds(kernels, block_rows, g.channels, panels.padded(),
                                          transformed / block_rows, vectors);
  // Transforms: a few operations per point, and vector, in each dimension.
  const double channels = static_cast<double>(ceil_div(g.channels, kBlock)) * kBlock;
  const double input_vectors = transformed * channels / kernels.lanes;
  const double output_vectors = transformed * panels.padded() / kernels.lanes;
  const double transform =
      (input_vectors * (3.0 + 0.35 * points) + output_vectors * (4.5 + 0.3 * big)) /
      vector_rate(kernels);
  constexpr double kFoldSteps = 22;  // many short runs of pixels
  const double copies = part.fold.factor > 1 ? kFoldSteps * transformed * channels / kernels.lanes /
                                                   vector_rate(kernels)
                                             : 0;
  const double weights = 4.0 * points * points * g.channels * panels.padded() *
                         (w.schedule == Schedule::kShared ? g.groups : blocks);
  const double traffic = weights / kSharedBytes;
  return (overlapped(multiply, traffic) + transform + copies) / threads + 4e-6;
}

double direct_seconds(const ConvKernels& kernels, const Part& part, int threads) {
  const Geometry& g = part.geometry;
  const Panels panels{g.filters, kernels.lanes};
  const int vectors = panels.filters > kernels.lanes ? 2 : 1;
  const double outputs = static_cast<double>(g.images) * g.groups * g.out_height;
  const double multiply =
      product_seconds(kernels, g.out_width, g.terms(), panels.padded(), outputs, vectors);
  const double stores =
      outputs * g.out_width * panels.padded() / kernels.lanes * 3.0 / vector_rate(kernels);
  return (multiply + stores) / threads + 3e-6;
}

}  // namespace

double predict_seconds(const ConvKernels& kernels, const Part& part, int threads) {
  return part.engine == Engine::kWinograd ? winograd_seconds(kernels, part, threads)
                                          : direct_seconds(kernels, part, threads);
}

}  // namespace fastalex::cpu::conv
