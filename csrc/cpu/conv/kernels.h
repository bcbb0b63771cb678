// The table of inner kernels that each instruction set provides to the convolution engine.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../dtypes.h"

namespace fastalex::cpu::conv {

// Transformed inputs are stored in blocks of this many channels: one cache line of floats, so that
// consecutive tiles of a block lie at a distance the kernels know at compile time.
inline constexpr int kBlock = 16;

inline constexpr int kMaxPoints = 9;  // per dimension of a Winograd tile

// A run of `length` consecutive inner-product terms starting `offset` floats into the A operand.
struct Segment {
  ptrdiff_t offset;
  int length;
};

// C[rows][vectors * lanes] (+)= A B, then bias and ReLU when asked for.
// Row i of A is the concatenation of a[i * row_stride + segment.offset ...] over the segments; B is
// packed [term][vectors * lanes]. 2 * rows * terms * vectors * lanes FLOPs.
struct GemmCall {
  const float* a;
  ptrdiff_t row_stride;
  int64_t rows;
  const Segment* segments;
  int segment_count;
  const float* b;
  int vectors;  // 1 or 2
  float* c;
  ptrdiff_t c_stride;
  bool accumulate;
  const float* bias;  // null: none
  bool relu;
  // Each float of A and B is two bfloat16 and each term their inner product; sums are floats. Only
  // where the table says that it has_pairs.
  bool pairs;
};

// C[columns][vectors * lanes], rows c_stride apart, (+)= A^T B with one term per pixel or tile:
// term t of a segment reads A's `columns` adjacent floats at a + offset + t * step; B is packed
// [term][vectors * lanes].
struct OuterCall {
  const float* a;
  ptrdiff_t step;
  int columns;
  const Segment* segments;
  int segment_count;
  const float* b;
  int vectors;
  float* c;
  ptrdiff_t c_stride;
  bool accumulate;
};

// How one dimension of a map is covered: big tiles first, then small ones.
struct Cover {
  int big;
  int small;
  int tiles() const { return big + small; }
};

// B^T d B of one row of tiles. points[i * kPoints + j] receives the tiles of point (i, j):
// [channel block][tile][kBlock], channel blocks block_strides[i * kPoints + j] floats apart.
struct InputRowCall {
  const float* const* rows;  // kPoints rows of pixels, the channels of a pixel adjacent
  int width;                 // pixels per row; what lies outside is zero
  ptrdiff_t pixel_stride;
  int first_column;  // of the first tile; negative under padding
  int blocks;        // channel blocks
  Cover columns;
  bool big_row;
  float* const* points;
  const ptrdiff_t* block_strides;
};

// A^T m A of one row of tiles, with bias and ReLU, written to pixels whose channels are adjacent.
struct OutputRowCall {
  const float* const* points;  // [tile][vectors * lanes] per point
  int vectors;
  int channels;       // valid ones among vectors * lanes
  const float* bias;  // vectors * lanes values, or null
  bool relu;
  Cover columns;
  bool big_row;
  float* output;
  ptrdiff_t pixel_stride;
  ptrdiff_t row_stride;
  uint8_t* nonfinite;  // per tile: set to 1 where a sum was NaN or infinite
};

// A dy A^T of one row of tiles, the adjoint of OutputRowCall's transform.
struct GradientRowCall {
  const float* gradient;
  ptrdiff_t pixel_stride;
  ptrdiff_t row_stride;
  int vectors;
  int channels;
  Cover columns;
  bool big_row;
  float* const* points;  // [tile][vectors * lanes] per point
};

struct WinogradKernels {
  int taps;
  int big;     // outputs of the big tile; the small one has one fewer
  int points;  // per dimension
  void (*input_row)(const InputRowCall&);
  void (*output_row)(const OutputRowCall&);
  void (*gradient_row)(const GradientRowCall&);
  // G w G^T: w is [taps * taps][vectors * lanes], points lie point_stride floats apart in u.
  void (*weights)(const float* w, int vectors, float* u, ptrdiff_t point_stride);
  // G^T u G, the adjoint.
  void (*weight_gradient)(const float* u, ptrdiff_t point_stride, int vectors, float* w);
};

// Reads `pixels` pixels of `channels` channels into float: out[pixel * out_stride + channel], and
// zeroes up to `padded_channels`. Where `mask` is given, values do not count where it is zero or
// negative; NaN lets them pass, as torch's ReLU does.
struct GatherCall {
  const void* data;
  DType dtype;
  int64_t pixel_stride;
  int64_t channel_stride;
  const void* mask;
  int64_t mask_pixel_stride;
  int64_t mask_channel_stride;
  int64_t pixels;
  int channels;
  int padded_channels;
  float* out;
  ptrdiff_t out_stride;
};

// The reverse, with the rounding to `dtype`.
struct ScatterCall {
  const float* data;
  ptrdiff_t data_stride;
  int64_t pixels;
  int channels;
  void* out;
  DType dtype;
  int64_t pixel_stride;
  int64_t channel_stride;
};

// out[pixel * out_stride + channel] += data's value, then ReLU where asked; NaN stays.
struct AddCall {
  const void* data;
  DType dtype;
  int64_t pixel_stride;
  int64_t channel_stride;
  int64_t pixels;
  int channels;
  bool relu;
  float* out;
  ptrdiff_t out_stride;
};

// data[pixel * stride + channel] = x * gain + shift of its channel, then ReLU where asked; NaN
// stays.
struct AffineCall {
  float* data;
  ptrdiff_t stride;
  int64_t pixels;
  int channels;
  const float* gain;
  const float* shift;
  bool relu;
};

// sums[row][dot_outputs] (+)= x[row] . w[output], each sum spread over the lanes of one vector, so
// that the rows of both matrices are read as they lie in memory.
struct DotCall {
  DType dtype;
  const void* x;
  int64_t x_stride;  // between rows, in elements
  int64_t rows;
  const void* w;
  int64_t w_stride;
  int outputs;  // 1 to dot_outputs
  int length;   // adjacent elements of a row
  float* sums;
};

struct ConvKernels {
  int lanes;            // floats per vector
  bool (*has_pairs)();  // whether this processor multiplies pairs of bfloat16
  int max_rows;         // of one register block with two vectors
  int dot_outputs;      // of one DotCall
  void (*gemm)(const GemmCall&);
  void (*outer)(const OuterCall&);
  void (*gather)(const GatherCall&);
  void (*scatter)(const ScatterCall&);
  void (*add)(const AddCall&);
  void (*affine)(const AffineCall&);
  void (*dot)(const DotCall&);
  // out[i] = the sum of vector i's lanes, through ReLU if asked; `count` is a multiple of the
  // lanes.
  void (*add_lanes)(const float* vectors, int64_t count, bool relu, float* out);
  // The kernels of F(big, taps) + F(big - 1, taps), or null where there are none.
  const WinogradKernels* (*winograd)(int taps, int big);

  int panel() const { return 2 * lanes; }
};

}  // namespace fastalex::cpu::conv
