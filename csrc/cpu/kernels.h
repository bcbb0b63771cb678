// What a kernel is told, and the table of kernels that each instruction set provides. No torch
// here.
#pragma once
#include <cstdint>

#include "dtypes.h"

namespace fastalex::cpu {

namespace conv {
struct ConvKernels;
}

// s_c = k + scale * (sum of x_j^2 over the `size` channels around c, inside c's group); y = x *
// s^-beta.
struct LrnParams {
  int64_t size;
  double scale;
  double beta;
  double k;
  int64_t groups;
};

struct PoolParams {
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;

  int64_t taps() const { return kernel_h * kernel_w; }
};

// An activation [N, C, H, W] in memory; strides count elements.
// channels_last: channel stride 1. Otherwise: pixel stride 1, and row stride = W (a dense plane).
struct Map {
  void* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, pixel_stride;
  bool channels_last;

  // Elements between what the row kernels step over: pixels of all channels, or channels of many
  // pixels.
  int64_t step() const { return channels_last ? pixel_stride : channel_stride; }
};

struct LrnCall {
  DType dtype;
  LrnParams lrn;
  Map input;
  Map output;
};

struct LrnBackwardCall {
  DType dtype;
  LrnParams lrn;
  Map grad;
  Map input;
  Map grad_input;
};

// offsets.data: one per output, kernel_row * kernel_w + kernel_column of the winner, uint8 up to
// 256 taps and int32 beyond; null where nobody wants them.
struct MaxPoolCall {
  DType dtype;
  PoolParams pool;
  Map input;
  Map output;
  Map offsets;
};

struct MaxPoolBackwardCall {
  DType dtype;
  PoolParams pool;
  Map grad;
  Map offsets;
  Map grad_input;
};

struct LrnMaxPoolCall {
  LrnParams lrn;
  MaxPoolCall pool;
};

struct LrnMaxPoolBackwardCall {
  LrnParams lrn;
  Map input;
  MaxPoolBackwardCall pool;
};

// y = (x + shift - mean) * scale over a crop of each image, mirrored where `mirrored` says so.
struct AugmentCall {
  DType dtype;            // of the output
  const uint8_t* images;  // [batch, height, width, channels], pixels adjacent
  int64_t batch, height, width, channels;
  int64_t batch_stride, row_stride;
  const int64_t* corners;  // [batch, 2]: top and left, inside the image
  const bool* mirrored;    // [batch]
  const float* shift;      // [batch, channels]
  const float* mean;       // [channels], or [height, width, channels]
  bool mean_is_image;
  float scale;
  void* output;  // [batch, out_height, pitch, channels]; zeros beyond out_width
  int64_t out_height, out_width, pitch;
};

struct Kernels {
  const char* isa;
  void (*lrn)(const LrnCall&);
  void (*lrn_backward)(const LrnBackwardCall&);
  void (*max_pool)(const MaxPoolCall&);
  void (*max_pool_backward)(const MaxPoolBackwardCall&);
  void (*lrn_max_pool)(const LrnMaxPoolCall&);
  void (*lrn_max_pool_backward)(const LrnMaxPoolBackwardCall&);
  void (*fingerprint)(const void* data, int64_t bytes, uint64_t* result);  // two words
  void (*augment)(const AugmentCall&);
  const conv::ConvKernels& (*conv)();  // the convolution engine's own table
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace fastalex::cpu
