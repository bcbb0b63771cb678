// Starts a kernel and checks that it started. One function, three bodies: CUDA's here, the
// planner's and that of the tests' host runtime in a host_launch.h of their own.
#pragma once

#include <stdexcept>
#include <string>

#include "ops.h"

namespace fastalex {

struct LaunchShape {
  long long blocks;
  int threads;
  int shared_bytes;
};

// "fastalex::lrn_forward<__half, 8, 5>" out of the compiler's name for this very function.
template <auto Kernel>
std::string kernel_name() {
  const std::string full = __PRETTY_FUNCTION__;
  const size_t begin = full.find("Kernel = ") + 9;
  return full.substr(begin, full.find_first_of(";]", begin) - begin);
}

[[noreturn]] inline void throw_launch_error(const std::string& kernel, const LaunchShape& shape,
                                            const std::string& reason) {
  throw std::runtime_error("fastalex: " + kernel + " did not start: " + reason + " (" +
                           std::to_string(shape.blocks) + " blocks of " +
                           std::to_string(shape.threads) + " threads, " +
                           std::to_string(shape.shared_bytes) + " bytes of shared memory)");
}

inline void require_grid(const std::string& kernel, const LaunchShape& shape) {
  if (shape.blocks > 0x7fffffffll)
    throw_launch_error(kernel, shape, "a grid has at most 2^31 - 1 blocks");
}

}  // namespace fastalex

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace fastalex {

template <auto Kernel, class Plan>
void launch(const LaunchShape& shape, Stream stream, const Plan& plan) {
  if (!shape.blocks) return;
  if (shape.blocks > 0x7fffffffll) require_grid(kernel_name<Kernel>(), shape);
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > 48 * 1024)  // more than the default must be asked for
    error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shape.shared_bytes);
  if (error == cudaSuccess) {
    Kernel<<<static_cast<unsigned>(shape.blocks), shape.threads, shape.shared_bytes, stream>>>(
        plan);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw_launch_error(kernel_name<Kernel>(), shape, cudaGetErrorString(error));
}

}  // namespace fastalex
#else
#include "host_launch.h"
#endif
