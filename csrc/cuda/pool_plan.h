// From views to the plan of a pooling kernel: the layout, the access width, the rows a thread walks
// down.
#pragma once

#include <initializer_list>

#include "max_pool.cuh"
#include "plans.h"

namespace fastalex {

struct PoolLayout {
  bool channels_last;
  int values;  // in one access along channels, or 1
};

inline bool offsets_are_packed(const Offsets& offsets, int values, bool channels_last) {
  return !offsets.view.data || (!offsets.wide && channels_are_dense(offsets.view) &&
                                packs_are_aligned(offsets.view, 1, values, channels_last));
}

inline PoolLayout pool_layout(DType dtype, std::initializer_list<View> views,
                              const Offsets& offsets) {
  PoolLayout layout = {true, wide_values(dtype)};
  for (const View& v : views) layout.channels_last &= channels_are_dense(v);
  for (const View& v : views)
    if (!packs_are_aligned(v, bytes_of(dtype), layout.values, true)) layout.values = 1;
  if (!layout.channels_last || !offsets_are_packed(offsets, layout.values, true)) layout.values = 1;
  return layout;
}

// The part of a plan that deals threads to the elements of `over`; bands of up to `rows` rows.
inline MaxPoolPlan make_place(const PoolLayout& layout, const View& over, int rows,
                              LaunchShape* shape) {
  MaxPoolPlan p = {};
  const long long height = over.size[2], width = over.size[3];
  p.channels_last = layout.channels_last;
  p.packs = to_int(over.size[1] / layout.values, "the number of channels");
  const long long threads = over.size[0] * p.packs * height * width;
  p.band =
      static_cast<int>(std::clamp(threads / kResidentThreads, 1ll, static_cast<long long>(rows)));
  if (!layout.channels_last) p.band = 1;
  const long long bands = ceil_div(height, p.band), items = bands * width * p.packs;
  p.by_packs = fast_divide(std::max(p.packs, 1)), p.by_out_w = fast_divide(std::max(width, 1ll));
  p.by_bands = fast_divide(std::max(bands, 1ll));
  p.items = to_int(items, "the work in one image");
  const long long blocks = ceil_div(items, kPoolThreads);
  p.by_blocks = fast_divide(std::max(blocks, 1ll));
  *shape = {over.size[0] * blocks, kPoolThreads, 0};
  return p;
}

inline PoolGradient make_pool_gradient(const View& grad, const Offsets& offsets, const View& grad_x,
                                       const PoolParams& params) {
  PoolGradient g = {};
  g.grad = grad.data, g.offsets = offsets.view.data, g.wide_offsets = offsets.wide;
  g.grad_stride = grad.strides(), g.offsets_stride = offsets.view.strides();
  g.window = make_pool_window(params, grad_x, grad);
  return g;
}

}  // namespace fastalex
