// Compiles the launchers of csrc/cuda with a plain C++ compiler and no CUDA: they decide what to
// launch, CuPy launches it.
#pragma once

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
