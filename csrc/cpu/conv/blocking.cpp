// How a Winograd part is cut into blocks so that what is reused stays in cache.
#include "panels.h"
#include "tiles.h"
#include "winograd.h"

namespace fastalex::cpu::conv {
namespace {

constexpr int64_t kPrivateBytes = 768 << 10;   // V of one worker's block: most of an L2
constexpr int64_t kSharedBytes = 14 << 20;     // V of all workers: under half of a last-level cache
constexpr int64_t kLargeWeights = 4 << 20;     // beyond this, read each weight once

int64_t transformed_bytes(const WinogradChoice& choice, const Geometry& g, int64_t images,
                          int rows) {
  const TileBlock block{0, images, 0, rows};
  return 4 * PointLayout(choice, block, int64_t{channel_blocks(g)} * kBlock).total();
}

void block_private(WinogradChoice& choice, const Geometry& g, int threads) {
  choice.schedule = Schedule::kPrivate;
  const int rows = choice.rows.tiles();
  const int64_t image_bytes = transformed_bytes(choice, g, 1, rows);
  const int64_t jobs_wanted = 2 * threads;
  if (image_bytes <= kPrivateBytes && g.images * g.groups >= jobs_wanted) {
    const int64_t fitting = std::max<int64_t>(1, kPrivateBytes / image_bytes);
    const int64_t even = std::max<int64_t>(1, g.images * g.groups / jobs_wanted);
    choice.images_per_block = std::min({fitting, even, g.images});
    choice.rows_per_block = rows;
    return;
  }
  choice.images_per_block = 1;
  const int64_t row_bytes = std::max<int64_t>(1, image_bytes / rows);
  const int64_t fitting = std::clamp<int64_t>(kPrivateBytes / row_bytes, 1, rows);
  const int64_t strips =
      std::max(ceil_div(rows, fitting), ceil_div(jobs_wanted, g.images * g.groups));
  choice.rows_per_block = static_cast<int>(ceil_div(rows, std::min<int64_t>(strips, rows)));
}

void block_shared(WinogradChoice& choice, const Geometry& g) {
  choice.schedule = Schedule::kShared;
  choice.rows_per_block = choice.rows.tiles();
  const int64_t image_bytes = g.groups * transformed_bytes(choice, g, 1, choice.rows.tiles());
  const int64_t fitting = std::clamp<int64_t>(kSharedBytes / image_bytes, 1, g.images);
  choice.images_per_block = ceil_div(g.images, ceil_div(g.images, fitting));
}

}  // namespace

void block_winograd(const ConvKernels& kernels, Part& part, int threads) {
  const Geometry& g = part.geometry;
  WinogradChoice& choice = part.winograd;
  const Panels panels{g.filters, kernels.lanes};
  const int points = choice.kernels->points;
  const int64_t weight_bytes = int64_t{4} * points * points * g.channels * panels.padded();
  const int64_t image_bytes = transformed_bytes(choice, g, 1, choice.rows.tiles());
  // Weights too large for a cache are worth one pass over them, if whole images can share V.
  if (weight_bytes > kLargeWeights && g.groups * image_bytes <= kSharedBytes) {
    block_shared(choice, g);
  } else {
    block_private(choice, g, threads);
  }
  part.packed_bytes = align_up(weight_bytes * g.groups);
  part.scratch_bytes = winograd_scratch_bytes(kernels, part, threads);
}

}  // namespace fastalex::cpu::conv
