// A C interface to the operators on the host runtime, for ctypes: errors come back as text.
#include "launch.h"
#include "ops.h"
#include "trace.h"

using namespace fastalex;

namespace {

std::string message;

template <class Function>
const char* guarded(Function function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#define HOST_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

HOST_CUDA_EXPORT void host_cuda_schedule(int kind, unsigned seed) {
  host_cuda::schedule = {static_cast<host_cuda::Schedule::Kind>(kind), seed};
}
HOST_CUDA_EXPORT void host_cuda_trace_begin() { host_cuda::trace_begin(); }
HOST_CUDA_EXPORT const char* host_cuda_trace_end() { return host_cuda::trace_end(); }

// The launches since the last call, a line each: kernel, blocks, threads, shared bytes, plan in
// hexadecimal.
HOST_CUDA_EXPORT const char* host_cuda_launches() {
  static std::string text;
  text.clear();
  for (const LaunchRecord& r : launch_records) {
    text += r.kernel + "\t" + std::to_string(r.shape.blocks) + "\t" +
            std::to_string(r.shape.threads) + "\t" + std::to_string(r.shape.shared_bytes) + "\t";
    for (unsigned char byte : r.plan)
      text += "0123456789abcdef"[byte >> 4], text += "0123456789abcdef"[byte & 15];
    text += "\n";
  }
  launch_records.clear();
  return text.c_str();
}
HOST_CUDA_EXPORT void host_cuda_dry_run(bool on) { launches_are_dry = on; }

HOST_CUDA_EXPORT const char* host_lrn(DType dtype, const View* x, const View* y,
                                      const LrnParams* p) {
  return guarded([&] { lrn(dtype, *x, *y, *p, nullptr); });
}
HOST_CUDA_EXPORT const char* host_lrn_backward(DType dtype, const View* grad, const View* x,
                                               const View* grad_x, const LrnParams* p) {
  return guarded([&] { lrn_backward(dtype, *grad, *x, *grad_x, *p, nullptr); });
}
HOST_CUDA_EXPORT const char* host_max_pool(DType dtype, const View* x, const View* y,
                                           const Offsets* offsets, const PoolParams* p) {
  return guarded([&] { max_pool(dtype, *x, *y, *offsets, *p, nullptr); });
}
HOST_CUDA_EXPORT const char* host_max_pool_backward(DType dtype, const View* grad,
                                                    const Offsets* offsets, const View* grad_x,
                                                    const PoolParams* p) {
  return guarded([&] { max_pool_backward(dtype, *grad, *offsets, *grad_x, *p, nullptr); });
}
HOST_CUDA_EXPORT bool host_lrn_max_pool_is_fused(DType dtype, const View* x, const View* y,
                                                 const PoolParams* p) {
  return lrn_max_pool_is_fused(dtype, *x, *y, *p);
}
HOST_CUDA_EXPORT const char* host_lrn_max_pool(DType dtype, const View* x, const View* y,
                                               const Offsets* offsets, const LrnParams* lrn,
                                               const PoolParams* pool) {
  return guarded([&] { lrn_max_pool(dtype, *x, *y, *offsets, *lrn, *pool, nullptr); });
}
HOST_CUDA_EXPORT const char* host_lrn_max_pool_backward(DType dtype, const View* grad,
                                                        const View* x, const Offsets* offsets,
                                                        const View* grad_x, const LrnParams* lrn,
                                                        const PoolParams* pool) {
  return guarded(
      [&] { lrn_max_pool_backward(dtype, *grad, *x, *offsets, *grad_x, *lrn, *pool, nullptr); });
}
HOST_CUDA_EXPORT long long host_conv_relu_workspace(DType dtype, const View* x, const View* weight,
                                                    const View* y, const ConvParams* p) {
  return conv_relu_workspace(dtype, *x, *weight, *y, *p);
}
HOST_CUDA_EXPORT const char* host_conv_relu(DType dtype, const View* x, const View* weight,
                                            const void* bias, const View* y, const ConvParams* p,
                                            void* workspace) {
  return guarded([&] { conv_relu(dtype, *x, *weight, bias, *y, *p, workspace, nullptr); });
}
HOST_CUDA_EXPORT long long host_conv_relu_backward_workspace(DType dtype, const View* output,
                                                             const View* x, const View* weight,
                                                             const ConvGradients* wanted,
                                                             const ConvParams* p) {
  return conv_relu_backward_workspace(dtype, *output, *x, *weight, *wanted, *p);
}
HOST_CUDA_EXPORT const char* host_conv_relu_backward(DType dtype, const View* grad,
                                                     const View* output, const View* x,
                                                     const View* weight,
                                                     const ConvGradients* wanted,
                                                     const ConvParams* p, void* workspace) {
  return guarded([&] {
    conv_relu_backward(dtype, *grad, *output, *x, *weight, *wanted, *p, workspace, nullptr);
  });
}
