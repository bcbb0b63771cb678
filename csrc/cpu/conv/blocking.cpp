// How a Winograd part is cut into blocks so that what is reused stays in cache.
#include "panels.h"
#include "tiles.h"
#include "winograd.h"

namespace fastalex::cpu::conv {
namespace {

// V and one panel's products of a worker's block, an L2 and some beyond; V of a strip; V of all
// workers, under half of a last-level cache.
constexpr int64_t kPrivateBytes = 1344 << 10, kStripBytes = 384 << 10, kSharedBytes = 14 << 20;

int64_t transformed_bytes(const WinogradChoice& choice, const Geometry& g, int64_t images,
                          int rows) {
  const TileBlock block{0, images, 0, rows};
  return 4 * PointLayout(choice, block, int64_t{channel_blocks(g)} * kBlock).total();
}

// Tile rows of a strip: as many as share L2 with their products, but enough tiles for the rows of
// the micro-kernel.
int64_t strip_rows(const WinogradChoice& choice, const Geometry& g) {
  constexpr int64_t kTiles = 28;
  const int64_t rows = choice.rows.tiles();
  const int64_t bytes = transformed_bytes(choice, g, 1, choice.rows.tiles());
  const int64_t fitting = kStripBytes * rows / bytes;
  return std::clamp(std::max(fitting, ceil_div(kTiles, choice.columns.tiles())), int64_t{1}, rows);
}

// Whole images while they fit; else strips of tile rows.
void block_private(WinogradChoice& choice, const Geometry& g, int panel, int threads) {
  choice.schedule = Schedule::kPrivate;
  const int rows = choice.rows.tiles();
  const int64_t image_bytes = transformed_bytes(choice, g, 1, rows);
  const int64_t jobs_wanted = 2 * threads;
  const int64_t even = g.images * g.groups / jobs_wanted;
  if (image_bytes <= kPrivateBytes * 5 / 8 && even >= 1) {
    const TileBlock image{0, 1, 0, rows};
    const int64_t product_bytes = 4 * PointLayout(choice, image, panel).total();
    const int64_t fitting = std::clamp<int64_t>(kPrivateBytes / (image_bytes + product_bytes), 1,
                                                std::min(even, g.images));
    choice.images_per_block = ceil_div(g.images, ceil_div(g.images, fitting));
    choice.rows_per_block = rows;
    return;
  }
  choice.images_per_block = 1;
  const int64_t strips =
      std::max(ceil_div(rows, strip_rows(choice, g)), ceil_div(jobs_wanted, g.images * g.groups));
  choice.rows_per_block = static_cast<int>(ceil_div(rows, std::min<int64_t>(strips, rows)));
}

// One image per job, in strips where it is large.
void block_image(WinogradChoice& choice, const Geometry& g) {
  choice.schedule = Schedule::kPrivate;
  choice.images_per_block = 1;
  const int rows = choice.rows.tiles();
  const int64_t bytes = transformed_bytes(choice, g, 1, rows);
  const int64_t fitting = bytes <= kPrivateBytes * 5 / 8 ? rows : strip_rows(choice, g);
  choice.rows_per_block = static_cast<int>(ceil_div(rows, ceil_div(rows, fitting)));
}

void block_shared(WinogradChoice& choice, const Geometry& g) {
  choice.schedule = Schedule::kShared;
  choice.rows_per_block = choice.rows.tiles();
  const int64_t image_bytes = g.groups * transformed_bytes(choice, g, 1, choice.rows.tiles());
  const int64_t fitting = std::clamp<int64_t>(kSharedBytes / image_bytes, 1, g.images);
  choice.images_per_block = ceil_div(g.images, ceil_div(g.images, fitting));
}

// Bytes that pass through the last-level cache: weights once per block under the private schedule,
// V once per panel of filters under the shared one.
double private_traffic(const WinogradChoice& choice, const Geometry& g, double weight_bytes) {
  const double blocks = static_cast<double>(ceil_div(g.images, choice.images_per_block)) *
                        static_cast<double>(ceil_div(choice.rows.tiles(), choice.rows_per_block));
  return g.groups * blocks * weight_bytes;
}

double shared_traffic(const WinogradChoice& choice, const Geometry& g, double weight_bytes,
                      int panels) {
  const double blocks = static_cast<double>(ceil_div(g.images, choice.images_per_block));
  const double v =
      static_cast<double>(g.images) * transformed_bytes(choice, g, 1, choice.rows.tiles());
  return g.groups * (blocks * weight_bytes + (panels + 2) * v);
}

}  // namespace

void block_winograd(const ConvKernels& kernels, Part& part, int threads) {
  const Geometry& g = part.geometry;
  WinogradChoice& choice = part.winograd;
  const Panels panels{g.filters, kernels.lanes};
  const int points = choice.kernels->points;
  const int64_t weight_bytes = int64_t{4} * points * points * g.channels * panels.padded();
  WinogradChoice shared = choice;
  block_private(choice, g, panels.width(), threads);
  block_shared(shared, g);
  const double bytes = static_cast<double>(weight_bytes);
  if (part.by_image) {
    block_image(choice, g);
  } else if (shared_traffic(shared, g, bytes, panels.count()) < private_traffic(choice, g, bytes)) {
    choice = shared;
  }
  part.packed_bytes = align_up(weight_bytes * g.groups);
  part.scratch_bytes = winograd_scratch_bytes(kernels, part, threads);
}

}  // namespace fastalex::cpu::conv
