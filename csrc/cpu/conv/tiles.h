// Which tiles a block of a Winograd run holds, and where each of its points lies in memory.
#pragma once
#include <algorithm>

#include "part.h"

namespace fastalex::cpu::conv {

// Tile rows [row_begin, row_end) of consecutive images.
struct TileBlock {
  int64_t image_begin = 0, images = 0;
  int row_begin = 0, row_end = 0;
};

// First output row (column) of a tile under a cover.
inline int tile_position(const Cover& cover, int big, int tile) {
  return tile < cover.big ? tile * big : cover.big * big + (tile - cover.big) * (big - 1);
}

// One matrix [tiles][floats_per_tile] per point; a block's big rows and columns come first, and
// only they own the last point of each dimension.
class PointLayout {
 public:
  PointLayout(const WinogradChoice& choice, const TileBlock& block, int64_t floats_per_tile)
      : points_(choice.kernels->points), block_(block) {
    const int rows = block.row_end - block.row_begin;
    big_rows_ = std::clamp(choice.rows.big - block.row_begin, 0, rows);
    rows_ = rows;
    big_columns_ = choice.columns.big;
    columns_ = choice.columns.tiles();
    for (int p = 0; p < points_ * points_; ++p) {
      base_[p] = total_;
      total_ += tiles(p) * floats_per_tile;
      // Points are written and read side by side: start each in an L1 set of its own.
      const ptrdiff_t set = (p + 1) * kSetStep % kPageFloats;
      total_ += (set - total_ % kPageFloats + kPageFloats) % kPageFloats;
    }
  }

  int64_t tiles(int p) const { return block_.images * owned_rows(p) * owned_columns(p); }
  // Index of the first tile of a tile row within its point.
  int64_t row_tile(int p, int64_t image, int row) const {
    return (image * owned_rows(p) + row - block_.row_begin) * owned_columns(p);
  }
  ptrdiff_t base(int p) const { return base_[p]; }
  ptrdiff_t total() const { return total_; }

 private:
  static constexpr ptrdiff_t kPageFloats = 1024, kSetStep = 5 * 16;

  int owned_rows(int p) const { return p / points_ < points_ - 1 ? rows_ : big_rows_; }
  int owned_columns(int p) const { return p % points_ < points_ - 1 ? columns_ : big_columns_; }

  int points_;
  TileBlock block_;
  int rows_, big_rows_, columns_, big_columns_;
  ptrdiff_t base_[kMaxPoints * kMaxPoints];
  ptrdiff_t total_ = 0;
};

}  // namespace fastalex::cpu::conv
