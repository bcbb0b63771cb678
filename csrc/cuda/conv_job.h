// A convolution ready to run: its plan, the packing before it, the addition after it, and its share
// of a workspace.
#pragma once

#include <numeric>

#include "conv_choice.h"
#include "conv_parts.cuh"

namespace fastalex {

// Hands out 256-byte aligned pieces of a workspace; without one it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  void* take(long long bytes) {
    void* piece = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  long long used() const { return used_; }

 private:
  char* base_;
  long long used_ = 0;
};

inline ConvAxis conv_axis(const ConvParams& p, int axis, long long in, long long out,
                          long long kernel) {
  ConvAxis a = {};
  a.in = to_int(in, "a side of the image"), a.out = to_int(out, "a side of the output");
  a.kernel = to_int(kernel, "a side of the filter");
  a.stride = p.stride[axis], a.padding = p.padding[axis], a.dilation = p.dilation[axis],
  a.period = 1;
  return a;
}

constexpr int kWindowCopyValues = 4;  // 16 bytes of float32, 8 of a half

struct ConvJob {
  ConvPlan plan = {};
  PackPlan pack = {};
  ReducePlan reduce = {};
  ConvCopy copy = ConvCopy::pixels;
  TileFacts tile = {};
  LaunchShape shape = {};
};

inline LaunchShape part_shape(long long items) {
  return {ceil_div(items, kPartThreads), kPartThreads, 0};
}

inline int stage_depth(DType dtype) { return kRowBytes / bytes_of(dtype); }

template <class Tile>
int conv_shared_bytes(DType dtype, int taps, int tap_depth) {
  const int fixed =
      dtype == DType::f32 ? ConvShared<Tile, float>::Taps : ConvShared<Tile, __half>::Taps;
  return fixed + tap_entries(taps, tap_depth, Tile::Stages * stage_depth(dtype)) *
                     static_cast<int>(sizeof(Tap));
}

inline int conv_shared_bytes(DType dtype, ConvShapeOfTile shape, int taps, int tap_depth) {
  switch (shape) {
    case ConvShapeOfTile::wide:
      return conv_shared_bytes<TileWide>(dtype, taps, tap_depth);
    case ConvShapeOfTile::middle:
      return conv_shared_bytes<TileMiddle>(dtype, taps, tap_depth);
    case ConvShapeOfTile::flat:
      return conv_shared_bytes<TileFlat>(dtype, taps, tap_depth);
    case ConvShapeOfTile::small:
      return conv_shared_bytes<TileSmall>(dtype, taps, tap_depth);
    case ConvShapeOfTile::group:
      return conv_shared_bytes<TileGroup>(dtype, taps, tap_depth);
    case ConvShapeOfTile::group_wide:
      return conv_shared_bytes<TileGroupWide>(dtype, taps, tap_depth);
    default:
      return conv_shared_bytes<TileFloat>(dtype, taps, tap_depth);
  }
}
inline int tile_threads(ConvShapeOfTile shape) {
  switch (shape) {
    case ConvShapeOfTile::flat:
      return TileFlat::Threads;
    case ConvShapeOfTile::group:
    case ConvShapeOfTile::group_wide:
      return TileGroup::Threads;
    default:
      return TileWide::Threads;
  }
}

// wgmma takes what the 16-byte copies bring, and rounds float32 otherwise than to_tf32 does.
inline void require_wgmma_serves(DType dtype, ConvCopy copy) {
  if (dtype == DType::f32)
    throw std::runtime_error("fastalex: wgmma multiplies float16 and bfloat16 alone");
  if (copy != ConvCopy::pixels)
    throw std::runtime_error(
        "fastalex: wgmma needs a channels_last input whose channels a group are a multiple of 8");
}

// The weight as it is, if it lies as the kernel walks through it.
inline bool weight_is_packed(DType dtype, const View& weight, const ConvPlan& p, bool window) {
  const long long channels = weight.size[1], width = weight.size[3], height = weight.size[2];
  return !p.transposed && !window && is_aligned(weight.data, 16) &&
         p.depth_pitch == height * width * channels && weight.stride[0] == p.depth_pitch &&
         (channels == 1 || weight.stride[1] == 1) && (width == 1 || weight.stride[3] == channels) &&
         (height == 1 || weight.stride[2] == width * channels) &&
         p.depth_pitch % wide_values(dtype) == 0;
}

// Forward: input is x and output y. Transposed: input is dz with `channels_in` padded channels a
// group, output grad_x.
inline ConvJob make_conv_job(DType dtype, const View& input, const View& weight, const void* bias,
                             const View& output, const ConvParams& params, bool transposed,
                             Workspace& workspace) {
  ConvJob job;
  ConvPlan& p = job.plan;
  const int values = wide_values(dtype);
  p.transposed = transposed, p.relu = !transposed && params.relu, p.bias = bias;
  p.x = input.data, p.y = output.data, p.x_stride = input.strides(), p.y_stride = output.strides();
  p.images = to_int(input.size[0], "the batch"), p.groups = params.groups;
  p.channels_in = to_int(input.size[1] / params.groups, "the number of channels");
  p.channels_out = to_int(output.size[1] / params.groups, "the number of channels");
  p.h = conv_axis(params, 0, input.size[2], output.size[2], weight.size[2]);
  p.w = conv_axis(params, 1, input.size[3], output.size[3], weight.size[3]);
  if (transposed) {
    p.h.period = p.h.stride / std::gcd(p.h.stride, p.h.dilation);
    p.w.period = p.w.stride / std::gcd(p.w.stride, p.w.dilation);
  }

  job.copy = transposed ? ConvCopy::pixels : choose_copy(dtype, input, weight, params);
  const bool window = job.copy == ConvCopy::window;
  p.window_values = window ? p.w.kernel * p.channels_in : 0;
  p.tap_depth =
      window ? static_cast<int>(ceil_div(p.window_values, kWindowCopyValues)) * kWindowCopyValues
             : p.channels_in;
  const long long taps_h = ceil_div(p.h.kernel, p.h.period),
                  taps_w = window ? 1 : ceil_div(p.w.kernel, p.w.period);
  p.depth_pitch = to_int(ceil_div(taps_h * taps_w * p.tap_depth, values) * values,
                         "the depth of a convolution");
  p.packed_store = channels_are_dense(output) && p.channels_out % values == 0 &&
                   packs_are_aligned(output, bytes_of(dtype), values, true);

  const int phases_h = transposed ? p.h.stride : 1, phases_w = transposed ? p.w.stride : 1;
  const long long pixels = ceil_div(p.h.out, phases_h) * ceil_div(p.w.out, phases_w) * p.images;
  to_int(output.size[0] * output.size[2] * output.size[3], "the number of output pixels");
  to_int(pixels, "the number of output pixels");
  const long long others = static_cast<long long>(p.groups) * phases_h * phases_w;
  if (params.wgmma) require_wgmma_serves(dtype, job.copy);
  job.tile = params.wgmma ? choose_group_tile(pixels, p.channels_out, others)
                          : choose_tile(dtype, job.copy, pixels, p.channels_out, others);
  const long long rows = ceil_div(pixels, job.tile.rows),
                  columns = ceil_div(p.channels_out, job.tile.columns);
  const long long blocks = rows * columns * p.groups * phases_h * phases_w;
  p.splits = choose_splits(blocks, ceil_div(p.depth_pitch, stage_depth(dtype)), job.tile.resident);
  p.by_columns = fast_divide(columns), p.by_groups = fast_divide(p.groups),
  p.by_rows = fast_divide(std::max(rows, 1ll));
  p.by_phases = fast_divide(phases_h * phases_w), p.by_phases_w = fast_divide(phases_w);
  p.by_tap_depth = fast_divide(p.tap_depth), p.by_channels_in = fast_divide(p.channels_in);
  job.shape = {blocks * p.splits, tile_threads(job.tile.shape),
               conv_shared_bytes(dtype, job.tile.shape,
                                 to_int(taps_h * taps_w, "the number of taps"), p.tap_depth)};

  p.weight = weight.data;
  if (!weight_is_packed(dtype, weight, p, window)) {
    PackPlan& k = job.pack;
    k.weight = weight.data, k.stride = weight.strides(), k.h = p.h, k.w = p.w;
    k.transposed = transposed, k.window = window, k.groups = p.groups, k.rows = p.channels_out;
    k.channels_out = to_int(weight.size[0] / p.groups, "the number of channels");
    k.channels_in = to_int(weight.size[1], "the number of channels");
    k.tap_depth = p.tap_depth, k.depth_pitch = p.depth_pitch, k.phases_w = phases_w;
    k.total =
        static_cast<long long>(phases_h) * phases_w * p.groups * p.channels_out * p.depth_pitch;
    p.weight = k.packed = workspace.take(k.total * bytes_of(dtype));
  }
  if (p.splits > 1) {
    ReducePlan& r = job.reduce;
    r.outer = output.size[0] * output.size[2] * output.size[3], r.inner = output.size[1];
    r.split_pitch = r.outer * r.inner, r.splits = p.splits, r.relu = p.relu, r.bias = bias,
    r.out = output.data;
    r.stride = output.strides(), r.height = p.h.out, r.width = p.w.out,
    r.kernel_w = r.channels_in = 1;
    p.partial = static_cast<float*>(
        workspace.take(r.split_pitch * p.splits * static_cast<long long>(sizeof(float))));
    r.partial = p.partial;
  }
  return job;
}

}  // namespace fastalex
