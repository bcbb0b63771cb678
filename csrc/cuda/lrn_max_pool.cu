// Chooses and starts the fused normalization and max-pooling kernels, forward and backward.
#include "dispatch.h"
#include "lrn_max_pool.cuh"
#include "lrn_plan.h"
#include "pool_plan.h"

namespace fastalex {
namespace {

constexpr int kRingBytes = 96 * 1024;  // two blocks an SM on sm_80 and newer
constexpr long long kResidentBlocks = 132 * 4;

int span(int outputs, const PoolParams& p, int axis) {
  return (outputs - 1) * p.stride[axis] + p.kernel[axis];
}

bool is_channels_last(const View& x, const View& y) {
  return channels_are_dense(x) && channels_are_dense(y);
}

// Channels last: columns of outputs whose ring of rows fits shared memory; 0 if not even one.
int ring_columns(DType dtype, const View& x, const PoolParams& p, long long out_w) {
  const long long pixel_bytes = p.kernel[0] * x.size[1] * bytes_of(dtype);
  for (long long columns = out_w;; columns = (columns + 1) / 2) {
    if (pixel_bytes * span(static_cast<int>(columns), p, 1) <= kRingBytes)
      return static_cast<int>(columns);
    if (columns == 1) return 0;
  }
}

// Channels first: outputs whose input tile fills a block's slots; a height of 0 if not even one.
void plane_tile(const PoolParams& p, const View& y, int* height, int* width) {
  constexpr int kPixels = kFusedThreads * kFusedSlots;
  *width = static_cast<int>(y.size[3]), *height = 0;
  while (*width > 1 && span(*width, p, 1) * p.kernel[0] > kPixels) *width = (*width + 1) / 2;
  while (*height < y.size[2] && span(*height + 1, p, 0) * span(*width, p, 1) <= kPixels) ++*height;
}

LrnMaxPoolPlan make_plan(const View& x, const View& y, const Offsets& offsets, const LrnParams& lrn,
                         const PoolParams& pool) {
  LrnMaxPoolPlan p = {};
  p.x = x.data, p.y = y.data, p.offsets = offsets.view.data;
  p.x_stride = x.strides(), p.y_stride = y.strides(), p.offsets_stride = offsets.view.strides();
  p.lrn = make_window(x, lrn), p.pool = make_pool_window(pool, x, y), p.wide_offsets = offsets.wide;
  return p;
}

void finish_plan(LrnMaxPoolPlan& p, const View& y, const PoolParams& pool) {
  p.input_w = span(p.tile_w, pool, 1);
  p.by_tiles_w = fast_divide(ceil_div(y.size[3], p.tile_w)),
  p.by_tiles_h = fast_divide(ceil_div(y.size[2], p.tile_h));
  p.by_input_w = fast_divide(p.input_w), p.by_tile_w = fast_divide(p.tile_w),
  p.by_ring = fast_divide(pool.kernel[0]);
  p.by_packs = fast_divide(std::max(p.packs, 1));
}

// The arithmetic follows from the normalization alone, so that it is the same with and without
// pooling.
template <class T, int V, bool Save>
void run_last(const LrnMaxPoolPlan& plan, const LaunchShape& shape, bool alexnet, bool window3,
              Stream stream) {
  if (!alexnet)
    launch<lrn_max_pool_channels_last<T, V, 0, 0, Save>>(shape, stream, plan);
  else
    window3 ? launch<lrn_max_pool_channels_last<T, V, 5, 3, Save>>(shape, stream, plan)
            : launch<lrn_max_pool_channels_last<T, V, 5, 0, Save>>(shape, stream, plan);
}
template <class T, bool Save>
void run(const LrnMaxPoolPlan& plan, const LaunchShape& shape, bool channels_last, int values,
         bool alexnet, Stream stream) {
  const bool window3 = plan.pool.h.kernel == 3 && plan.pool.w.kernel == 3;
  if (channels_last)
    values > 1 ? run_last<T, 16 / sizeof(T), Save>(plan, shape, alexnet, window3, stream)
               : run_last<T, 1, Save>(plan, shape, alexnet, window3, stream);
  else if (!alexnet)
    launch<lrn_max_pool_channels_first<T, 0, 0, Save>>(shape, stream, plan);
  else
    window3 ? launch<lrn_max_pool_channels_first<T, 5, 3, Save>>(shape, stream, plan)
            : launch<lrn_max_pool_channels_first<T, 5, 0, Save>>(shape, stream, plan);
}

}  // namespace

bool lrn_max_pool_is_fused(DType dtype, const View& x, const View& y, const PoolParams& pool) {
  if (is_channels_last(x, y)) return ring_columns(dtype, x, pool, y.size[3]) > 0;
  int height, width;
  plane_tile(pool, y, &height, &width);
  return height > 0;
}

void lrn_max_pool(DType dtype, const View& x, const View& y, const Offsets& offsets,
                  const LrnParams& lrn, const PoolParams& pool, Stream stream) {
  if (!x.size[0] || !x.size[1]) return;
  LrnMaxPoolPlan p = make_plan(x, y, offsets, lrn, pool);
  const bool channels_last = is_channels_last(x, y);
  LaunchShape shape;
  int values = 1;
  if (channels_last) {
    const LrnLayout layout = lrn_layout(dtype, {x, y}, lrn, true);
    values = offsets_are_packed(offsets, layout.values, true) ? layout.values : 1;
    p.packs = to_int(x.size[1] / values, "the number of channels");
    p.tile_w = ring_columns(dtype, x, pool, y.size[3]), p.input_h = pool.kernel[0];
    const long long columns = x.size[0] * ceil_div(y.size[3], p.tile_w);
    p.tile_h = static_cast<int>(std::clamp(columns * y.size[2] / kResidentBlocks, 1ll, y.size[2]));
    finish_plan(p, y, pool);
    const long long blocks = columns * ceil_div(y.size[2], p.tile_h);
    shape = {blocks, kFusedThreads,
             static_cast<int>(p.input_h * p.input_w * x.size[1] * bytes_of(dtype))};
  } else {
    plane_tile(pool, y, &p.tile_h, &p.tile_w);
    p.input_h = span(p.tile_h, pool, 0);
    finish_plan(p, y, pool);
    const long long tiles =
        ceil_div(y.size[2], p.tile_h) * ceil_div(y.size[3], p.tile_w) * x.size[0] * lrn.groups;
    const long long parts =
        std::clamp(kResidentBlocks / tiles, 1ll, std::max(p.lrn.group_channels / 16ll, 1ll));
    p.segment = static_cast<int>(ceil_div(p.lrn.group_channels, parts));
    p.by_parts = fast_divide(ceil_div(p.lrn.group_channels, p.segment)),
    p.by_segments = fast_divide(lrn.groups);
    shape = {tiles * p.by_parts.divisor, kFusedThreads,
             2 * p.input_h * p.input_w * bytes_of(dtype)};
  }
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    const bool alexnet = is_alexnet(lrn);
    offsets.view.data ? run<T, true>(p, shape, channels_last, values, alexnet, stream)
                      : run<T, false>(p, shape, channels_last, values, alexnet, stream);
  });
}

void lrn_max_pool_backward(DType dtype, const View& grad, const View& x, const Offsets& offsets,
                           const View& grad_x, const LrnParams& lrn, const PoolParams& pool,
                           Stream stream) {
  LrnLayout layout = lrn_layout(dtype, {x, grad_x}, lrn, true);
  const PoolLayout behind = pool_layout(dtype, {grad}, offsets);
  if (!layout.channels_last || behind.values == 1) layout.values = 1;
  const PoolGradient gradient = make_pool_gradient(grad, offsets, grad_x, pool);
  LaunchShape shape;
  const LrnBackwardPlan plan =
      make_lrn_backward_plan(layout, x, grad_x, lrn, &gradient, nullptr, &shape);
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    constexpr int kWide = 16 / sizeof(T);
    if (layout.direct)
      launch<lrn_backward_direct<T, true>>(shape, stream, plan);
    else if (!layout.channels_last)
      launch<lrn_backward_channels_first<T, 1, 5, true>>(shape, stream, plan);
    else if (layout.values == 1)
      is_alexnet(lrn) ? launch<lrn_backward_channels_last<T, 1, 5, true>>(shape, stream, plan)
                      : launch<lrn_backward_channels_last<T, 1, 0, true>>(shape, stream, plan);
    else if (is_alexnet(lrn))
      launch<lrn_backward_channels_last<T, kWide, 5, true>>(shape, stream, plan);
    else
      launch<lrn_backward_channels_last<T, kWide, 0, true>>(shape, stream, plan);
  });
}

}  // namespace fastalex
