// Compiles csrc/cuda with a plain C++ compiler and no CUDA: the launchers decide what to launch,
// and CuPy launches it. Force-included before every source.
#pragma once

#define FASTALEX_WITHOUT_CUDA
#define FASTALEX_NAMESPACE fastalex_cuda_plan

#include <cmath>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct PlannerIndex {
  int x;
};
inline constexpr PlannerIndex threadIdx = {0}, blockIdx = {0};
inline void __syncthreads() {}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
