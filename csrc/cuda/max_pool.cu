// Chooses and starts the max-pooling kernels, forward and backward.
#include "dispatch.h"
#include "max_pool.cuh"
#include "pool_plan.h"

namespace fastalex {
namespace {

template <class T, int V, bool Save>
void run_forward(const MaxPoolPlan& plan, const LaunchShape& shape, Stream stream) {
  plan.window.h.kernel == 3 && plan.window.w.kernel == 3
      ? launch<max_pool<T, V, Save, 3>>(shape, stream, plan)
      : launch<max_pool<T, V, Save, 0>>(shape, stream, plan);
}
template <class T, int V>
void run_forward(const MaxPoolPlan& plan, const LaunchShape& shape, Stream stream) {
  plan.offsets ? run_forward<T, V, true>(plan, shape, stream)
               : run_forward<T, V, false>(plan, shape, stream);
}
template <class T, int V>
void run_backward(const MaxPoolBackwardPlan& plan, const LaunchShape& shape, Stream stream) {
  const PoolWindow& w = plan.gradient.window;
  w.h.kernel <= 2 * w.h.stride&& w.w.kernel <= 2 * w.w.stride&& w.h.dilation == 1 &&
          w.w.dilation == 1
      ? launch<max_pool_backward<T, V, 2>>(shape, stream, plan)
      : launch<max_pool_backward<T, V, 0>>(shape, stream, plan);
}

}  // namespace

void max_pool(DType dtype, const View& x, const View& y, const Offsets& offsets,
              const PoolParams& params, Stream stream) {
  const PoolLayout layout = pool_layout(dtype, {x, y}, offsets);
  LaunchShape shape;
  MaxPoolPlan plan = make_place(layout, y, 16, &shape);
  plan.x = x.data, plan.x_stride = x.strides(), plan.y = y.data, plan.y_stride = y.strides();
  plan.offsets = offsets.view.data, plan.offsets_stride = offsets.view.strides(),
  plan.wide_offsets = offsets.wide;
  plan.window = make_pool_window(params, x, y);
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    layout.values > 1 ? run_forward<T, 16 / sizeof(T)>(plan, shape, stream)
                      : run_forward<T, 1>(plan, shape, stream);
  });
}

void max_pool_backward(DType dtype, const View& grad, const Offsets& offsets, const View& grad_x,
                       const PoolParams& params, Stream stream) {
  const PoolLayout layout = pool_layout(dtype, {grad, grad_x}, offsets);
  LaunchShape shape;
  MaxPoolBackwardPlan plan = {};
  plan.place = make_place(layout, grad_x, 4, &shape);
  plan.gradient = make_pool_gradient(grad, offsets, grad_x, params);
  plan.place.y = grad_x.data, plan.place.y_stride = grad_x.strides();
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    layout.values > 1 ? run_backward<T, 16 / sizeof(T)>(plan, shape, stream)
                      : run_backward<T, 1>(plan, shape, stream);
  });
}

}  // namespace fastalex
