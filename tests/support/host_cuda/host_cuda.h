// CUDA's keywords, builtin variables and intrinsics for g++; force-included before every kernel
// source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (host_cuda::state.current->thread)
#define blockIdx (host_cuda::state.block)
#define blockDim (host_cuda::state.block_dim)
#define gridDim (host_cuda::state.grid_dim)

inline void __syncthreads() { host_cuda::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { host_cuda::sync_warp(mask, nullptr); }

namespace host_cuda {

struct ShuffleInput {
  const void* value;
  unsigned bytes, source;
};
inline void exchange_shuffle(WarpMeeting& meeting) {
  for (Fiber* fiber : meeting.lane) {
    if (!fiber) continue;
    auto mine = static_cast<const ShuffleInput*>(fiber->input);
    Fiber* source = meeting.lane[mine->source];
    if (!source) fail("shuffle reads a lane outside its mask");
    std::memcpy(fiber->output, static_cast<const ShuffleInput*>(source->input)->value, mine->bytes);
  }
}
template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  T result;
  const ShuffleInput input{&value, sizeof(T), source};
  state.current->input = &input, state.current->output = &result;
  sync_warp(mask, exchange_shuffle);
  return result;
}

}  // namespace host_cuda

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return host_cuda::shuffle(mask, value, source & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return host_cuda::shuffle(mask, value, (host_cuda::lane() ^ bits) & 31);
}
