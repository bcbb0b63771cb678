// The Winograd engine's steps, shared by the forward pass and the weight gradient.
#pragma once
#include "panels.h"
#include "source.h"
#include "tiles.h"

namespace fastalex::cpu::conv {

inline int channel_blocks(const Geometry& g) {
  return static_cast<int>(ceil_div(g.channels, kBlock));
}

// Rows of the input that no tile owns read as zero from here.
inline int64_t zero_row_floats(const Geometry& g) {
  return int64_t{g.width} * std::max(g.groups * g.channels, channel_blocks(g) * kBlock);
}

inline int64_t window_floats(const Part& part) {
  return RowWindow::floats(part.geometry, part.winograd.kernels->points,
                           channel_blocks(part.geometry) * kBlock);
}

// Transforms tile rows of the input into V: per point [channel block][tile][kBlock].
class InputTransform {
 public:
  InputTransform(const Part& part, const InputSource& source, const float* zeros)
      : part_(part), source_(source), zeros_(zeros) {}

  // Channel blocks [block_begin, block_end) of one tile row; `image` counts from the layout's
  // block.
  void row(const PointLayout& layout, const TileBlock& block, int64_t image, int group, int row,
           int block_begin, int block_end, RowWindow& window, float* v) const;

 private:
  const Part& part_;
  const InputSource& source_;
  const float* zeros_;
};

// M[point][tile][panel] = V[point] U[point] for the tiles [first_tile, first_tile + tiles) of each.
struct PointProduct {
  const float* v;
  const PointLayout* v_layout;
  int64_t first_image;  // of m's block within v's
  const TileBlock* block;
  const float* u;  // [point][channels][panel]
  float* m;
  const PointLayout* m_layout;
  int vectors;
  Span prefetch;  // memory to bring into L2 meanwhile
};
void multiply_points(const ConvKernels& kernels, const Part& part, const PointProduct& product);

size_t winograd_scratch_bytes(const ConvKernels& kernels, const Part& part, int threads);

}  // namespace fastalex::cpu::conv
