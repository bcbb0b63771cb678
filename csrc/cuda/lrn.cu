// Chooses and starts the local response normalization kernels, forward and backward.
#include "dispatch.h"
#include "lrn.cuh"
#include "lrn_backward.cuh"
#include "lrn_plan.h"

namespace fastalex {
namespace {

template <class T, int V>
void run_forward(const LrnPlan& plan, const LaunchShape& shape, bool channels_last, bool alexnet,
                 Stream stream) {
  if (channels_last)
    alexnet ? launch<lrn_channels_last<T, V, 5>>(shape, stream, plan)
            : launch<lrn_channels_last<T, V, 0>>(shape, stream, plan);
  else
    alexnet ? launch<lrn_channels_first<T, V, 5>>(shape, stream, plan)
            : launch<lrn_channels_first<T, V, 0>>(shape, stream, plan);
}

template <class T, int V>
void run_backward(const LrnBackwardPlan& plan, const LaunchShape& shape, bool channels_last,
                  bool alexnet, Stream stream) {
  if (!channels_last)
    launch < lrn_backward_channels_first<T, V<4 ? V : 4, 5, false>>(shape, stream, plan);
  else if (alexnet)
    launch<lrn_backward_channels_last<T, V, 5, false>>(shape, stream, plan);
  else
    launch<lrn_backward_channels_last<T, V, 0, false>>(shape, stream, plan);
}

}  // namespace

void lrn(DType dtype, const View& x, const View& y, const LrnParams& params, Stream stream) {
  const LrnLayout layout = lrn_layout(dtype, {x, y}, params, false);
  LaunchShape shape;
  const LrnPlan plan = make_lrn_plan(layout, x, y, params, &shape);
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    layout.values > 1
        ? run_forward<T, 16 / sizeof(T)>(plan, shape, layout.channels_last, is_alexnet(params),
                                         stream)
        : run_forward<T, 1>(plan, shape, layout.channels_last, is_alexnet(params), stream);
  });
}

void lrn_backward(DType dtype, const View& grad, const View& x, const View& grad_x,
                  const LrnParams& params, Stream stream) {
  LrnLayout layout = lrn_layout(dtype, {x, grad_x, grad}, params, false);
  LaunchShape shape;
  const LrnBackwardPlan plan =
      make_lrn_backward_plan(layout, x, grad_x, params, nullptr, &grad, &shape);
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    if (layout.direct)
      launch<lrn_backward_direct<T, false>>(shape, stream, plan);
    else if (layout.values > 1)
      run_backward<T, 16 / sizeof(T)>(plan, shape, layout.channels_last, is_alexnet(params),
                                      stream);
    else
      run_backward<T, 1>(plan, shape, layout.channels_last, is_alexnet(params), stream);
  });
}

}  // namespace fastalex
