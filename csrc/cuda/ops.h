// The operators as C++ functions on views: what the torch registration and the tests call. Outputs
// are given, of the right size; no operator allocates, copies or synchronises.
#pragma once

#include "view.h"

struct CUstream_st;

namespace fastalex {

using Stream = CUstream_st*;

struct LrnParams {
  int size;
  float scale, beta, k;
  int groups;
};
struct PoolParams {
  int kernel[2], stride[2], padding[2], dilation[2];
};
struct Offsets {
  View view;  // null data: not wanted
  bool wide;  // int32 instead of uint8
};

void lrn(DType dtype, const View& x, const View& y, const LrnParams& lrn, Stream stream);
void lrn_backward(DType dtype, const View& grad, const View& x, const View& grad_x,
                  const LrnParams& lrn, Stream stream);
void max_pool(DType dtype, const View& x, const View& y, const Offsets& offsets,
              const PoolParams& pool, Stream stream);
void max_pool_backward(DType dtype, const View& grad, const Offsets& offsets, const View& grad_x,
                       const PoolParams& pool, Stream stream);

// Whether a tile of this window fits a block; if not, the caller runs lrn and max_pool in turn.
bool lrn_max_pool_is_fused(DType dtype, const View& x, const View& y, const PoolParams& pool);
void lrn_max_pool(DType dtype, const View& x, const View& y, const Offsets& offsets,
                  const LrnParams& lrn, const PoolParams& pool, Stream stream);
void lrn_max_pool_backward(DType dtype, const View& grad, const View& x, const Offsets& offsets,
                           const View& grad_x, const LrnParams& lrn, const PoolParams& pool,
                           Stream stream);

struct ConvParams {
  int stride[2], padding[2], dilation[2], groups;
  bool tf32;  // float32 on tensor cores, rounded to TF32; else IEEE float32
  bool relu;
  bool wgmma;  // Hopper's instruction for 16-bit convolutions, on sm_90a alone
};
// `bias` is dense, or null. The workspace is the caller's, 256-byte aligned, and holds nothing
// between calls.
long long conv_relu_workspace(DType dtype, const View& x, const View& weight, const View& y,
                              const ConvParams& conv);
void conv_relu(DType dtype, const View& x, const View& weight, const void* bias, const View& y,
               const ConvParams& conv, void* workspace, Stream stream);

// What is not wanted has null data. `output` is what conv_relu returned.
struct ConvGradients {
  View input, weight;
  void* bias;
};
long long conv_relu_backward_workspace(DType dtype, const View& output, const View& x,
                                       const View& weight, const ConvGradients& wanted,
                                       const ConvParams& conv);
void conv_relu_backward(DType dtype, const View& grad, const View& output, const View& x,
                        const View& weight, const ConvGradients& wanted, const ConvParams& conv,
                        void* workspace, Stream stream);

}  // namespace fastalex
