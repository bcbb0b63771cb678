// The C interface of the planner: each call answers with the launches of one operator, for a caller
// that has a GPU.
#include "launch.h"
#include "ops.h"

namespace fastalex {

char* dynamic_shared() { return nullptr; }
unsigned shared_address(const void*) { return 0; }

}  // namespace fastalex

using namespace fastalex;

#define FASTALEX_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string message;

// Runs one launcher; the number of launches, or -1 and a message.
template <class Function>
int planning(Function function) {
  planned.clear();
  try {
    function();
    return static_cast<int>(planned.size());
  } catch (const std::exception& error) {
    message = error.what();
    return -1;
  }
}

}  // namespace

FASTALEX_EXPORT const PlannedLaunch* fastalex_planned() { return planned.data(); }
FASTALEX_EXPORT const char* fastalex_plan_error() { return message.c_str(); }

FASTALEX_EXPORT int fastalex_plan_lrn(DType dtype, const View* x, const View* y,
                                      const LrnParams* p) {
  return planning([&] { lrn(dtype, *x, *y, *p, nullptr); });
}
FASTALEX_EXPORT int fastalex_plan_lrn_backward(DType dtype, const View* grad, const View* x,
                                               const View* grad_x, const LrnParams* p) {
  return planning([&] { lrn_backward(dtype, *grad, *x, *grad_x, *p, nullptr); });
}
FASTALEX_EXPORT int fastalex_plan_max_pool(DType dtype, const View* x, const View* y,
                                           const Offsets* offsets, const PoolParams* p) {
  return planning([&] { max_pool(dtype, *x, *y, *offsets, *p, nullptr); });
}
FASTALEX_EXPORT int fastalex_plan_max_pool_backward(DType dtype, const View* grad,
                                                    const Offsets* offsets, const View* grad_x,
                                                    const PoolParams* p) {
  return planning([&] { max_pool_backward(dtype, *grad, *offsets, *grad_x, *p, nullptr); });
}
FASTALEX_EXPORT bool fastalex_lrn_max_pool_is_fused(DType dtype, const View* x, const View* y,
                                                    const PoolParams* p) {
  return lrn_max_pool_is_fused(dtype, *x, *y, *p);
}
FASTALEX_EXPORT int fastalex_plan_lrn_max_pool(DType dtype, const View* x, const View* y,
                                               const Offsets* offsets, const LrnParams* lrn,
                                               const PoolParams* pool) {
  return planning([&] { lrn_max_pool(dtype, *x, *y, *offsets, *lrn, *pool, nullptr); });
}
FASTALEX_EXPORT int fastalex_plan_lrn_max_pool_backward(DType dtype, const View* grad,
                                                        const View* x, const Offsets* offsets,
                                                        const View* grad_x, const LrnParams* lrn,
                                                        const PoolParams* pool) {
  return planning(
      [&] { lrn_max_pool_backward(dtype, *grad, *x, *offsets, *grad_x, *lrn, *pool, nullptr); });
}
FASTALEX_EXPORT long long fastalex_conv_relu_workspace(DType dtype, const View* x,
                                                       const View* weight, const View* y,
                                                       const ConvParams* p) {
  return conv_relu_workspace(dtype, *x, *weight, *y, *p);
}
FASTALEX_EXPORT int fastalex_plan_conv_relu(DType dtype, const View* x, const View* weight,
                                            const void* bias, const View* y, const ConvParams* p,
                                            void* workspace) {
  return planning([&] { conv_relu(dtype, *x, *weight, bias, *y, *p, workspace, nullptr); });
}
FASTALEX_EXPORT long long fastalex_conv_relu_backward_workspace(DType dtype, const View* output,
                                                                const View* x, const View* weight,
                                                                const ConvGradients* wanted,
                                                                const ConvParams* p) {
  return conv_relu_backward_workspace(dtype, *output, *x, *weight, *wanted, *p);
}
FASTALEX_EXPORT int fastalex_plan_conv_relu_backward(DType dtype, const View* grad,
                                                     const View* output, const View* x,
                                                     const View* weight,
                                                     const ConvGradients* wanted,
                                                     const ConvParams* p, void* workspace) {
  return planning([&] {
    conv_relu_backward(dtype, *grad, *output, *x, *weight, *wanted, *p, workspace, nullptr);
  });
}
