// From views to the plan of a normalization kernel: the layout, the access width, the number of
// blocks.
#pragma once

#include <vector>

#include "lrn_backward.cuh"
#include "plans.h"

namespace fastalex {

struct LrnLayout {
  std::vector<View> views;  // rows folded into columns where all allow it
  bool channels_last;
  int values;   // in one access: 16 bytes' worth, or 1 where alignment or divisibility forbid it
  bool direct;  // backward with a window too large to exchange inside a block
};

inline LrnLayout lrn_layout(DType dtype, std::vector<View> views, const LrnParams& params,
                            bool keep_rows) {
  LrnLayout layout = {std::move(views), true, wide_values(dtype), false};
  for (const View& v : layout.views) layout.channels_last &= channels_are_dense(v);
  if (!keep_rows) {
    bool foldable = true;
    for (const View& v : layout.views)
      foldable &= v.size[2] == 1 || v.size[3] == 1 || v.stride[2] == v.size[3] * v.stride[3];
    if (foldable)
      for (View& v : layout.views) fold_rows(v);
  }
  const long long group = layout.views[0].size[1] / params.groups;
  for (const View& v : layout.views) {
    const bool dense = layout.channels_last ? group % layout.values == 0 : v.stride[3] == 1;
    if (!dense || !packs_are_aligned(v, bytes_of(dtype), layout.values, layout.channels_last))
      layout.values = 1;
  }
  return layout;
}

inline LaunchShape image_blocks(long long images, long long items, long long items_a_block,
                                int shared_bytes, FastDivide* by_blocks) {
  const long long blocks = ceil_div(items, items_a_block);
  *by_blocks = fast_divide(std::max(blocks, 1ll));
  return {images * blocks, kLrnThreads, shared_bytes};
}

inline LrnPlan make_lrn_plan(const LrnLayout& layout, const View& x, const View& y,
                             const LrnParams& params, LaunchShape* shape) {
  const View &in = layout.views[0], &out = layout.views[1];
  LrnPlan p = {};
  p.x = x.data, p.y = y.data, p.x_stride = in.strides(), p.y_stride = out.strides();
  p.window = make_window(in, params);
  const long long rows = in.size[2], columns = in.size[3], channels = in.size[1];
  long long items;
  if (layout.channels_last) {
    p.packs = to_int(channels / layout.values, "the number of channels");
    p.by_columns = fast_divide(std::max(columns, 1ll)), p.by_segments = fast_divide(1);
    items = rows * columns * p.packs;
  } else {
    const long long packs = columns / layout.values,
                    threads = in.size[0] * params.groups * rows * packs;
    const long long parts = std::clamp(kResidentThreads / std::max(threads, 1ll), 1ll,
                                       std::max(p.window.group_channels / 16ll, 1ll));
    p.segment = static_cast<int>(ceil_div(p.window.group_channels, parts));
    p.packs = to_int(rows * packs, "a plane");
    p.by_columns = fast_divide(std::max(packs, 1ll));
    p.by_segments = fast_divide(ceil_div(p.window.group_channels, p.segment));
    items = static_cast<long long>(p.packs) * params.groups * p.by_segments.divisor;
  }
  p.by_packs = fast_divide(std::max(p.packs, 1));
  p.items = to_int(items, "the work in one image");
  *shape = image_blocks(in.size[0], items, kLrnThreads, 0, &p.by_blocks);
  return p;
}

// With `pool` the gradient is gathered from pooling, else `grad` has x's shape (and its folded view
// is views[2]).
inline LrnBackwardPlan make_lrn_backward_plan(LrnLayout& layout, const View& x, const View& grad_x,
                                              const LrnParams& params, const PoolGradient* pool,
                                              const View* grad, LaunchShape* shape) {
  LrnBackwardPlan p = {};
  const LrnWindow w = make_window(x, params);
  p.halo_low = static_cast<int>(ceil_div(w.after, layout.values));
  p.halo_high = static_cast<int>(ceil_div(w.before, layout.values));
  layout.direct =
      layout.channels_last ? p.halo_low + p.halo_high > kLrnThreads / 2 : !is_alexnet(params);
  if (layout.direct) layout.channels_last = false, layout.values = 1;
  // Two running windows of eight pixels do not fit registers.
  if (!layout.channels_last) layout.values = std::min(layout.values, 4);
  p.lrn = make_lrn_plan(layout, x, grad_x, params, shape);
  if (pool) p.pool = *pool;
  if (grad) p.grad = grad->data, p.grad_stride = layout.views[2].strides();
  if (layout.channels_last)
    *shape = image_blocks(x.size[0], p.lrn.items, kLrnThreads - p.halo_low - p.halo_high,
                          static_cast<int>(kLrnThreads * layout.values * sizeof(float)),
                          &p.lrn.by_blocks);
  return p;
}

}  // namespace fastalex
