// Predicted time of a part: FLOPs and bytes against rates of a core.
#include "cost.h"

#include <algorithm>

#include "panels.h"
#include "tiles.h"

namespace fastalex::cpu::conv {
namespace {

// Rates of a core per float lane; ratios between engines matter, not the absolute values.
constexpr double kClock = 3.5e9;
constexpr double kFlopsPerLane = 4.0 * kClock;  // two fused multiply-adds a cycle
constexpr double kSharedBytes = 16e9;           // last-level cache or memory, per core
constexpr double kProductEfficiency = 0.88;

// A register block with few rows leaves multipliers idle while it waits for its own sums.
double row_efficiency(const ConvKernels& kernels, double rows, int vectors) {
  constexpr double kSumsInFlight = 8;
  const double blocks = static_cast<double>(ceil_div(static_cast<int64_t>(rows), kernels.max_rows));
  const double sums = rows / blocks * vectors;
  return std::min(1.0, sums / kSumsInFlight) * rows / (rows + 0.6 * blocks);
}

double product_seconds(const ConvKernels& kernels, double rows, double terms, double width,
                       double calls, int vectors) {
  const double flops = 2.0 * rows * terms * width * calls;
  return flops / (kFlopsPerLane * kernels.lanes * kProductEfficiency *
                  row_efficiency(kernels, rows, vectors));
}

// Fetching hides behind multiplying, but not all of it.
double overlapped(double multiply, double traffic) {
  constexpr double kExposed = 0.25;
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
      (input_vectors * (3.0 + 0.35 * points) + output_vectors * (2.0 + 0.3 * big)) / kClock;
  const double copies =
      part.fold.factor > 1 ? 2.0 * transformed * channels / kernels.lanes / kClock : 0;
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
  const double stores = outputs * g.out_width * panels.padded() / kernels.lanes * 3.0 / kClock;
  return (multiply + stores) / threads + 3e-6;
}

}  // namespace

double predict_seconds(const ConvKernels& kernels, const Part& part, int threads) {
  return part.engine == Engine::kWinograd ? winograd_seconds(kernels, part, threads)
                                          : direct_seconds(kernels, part, threads);
}

}  // namespace fastalex::cpu::conv
