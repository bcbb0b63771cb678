// The plain numbers that every plan of the memory-bound operators is made of.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "launch.h"
#include "lrn_window.cuh"
#include "ops.h"
#include "pool_window.cuh"

namespace fastalex {

inline long long ceil_div(long long a, long long b) { return (a + b - 1) / b; }

inline int to_int(long long value, const char* what) {
  if (value > 0x7fffffffll)
    throw std::runtime_error(std::string("fastalex: ") + what + " is " + std::to_string(value) +
                             "; kernels count it up to 2^31 - 1: split the batch");
  return static_cast<int>(value);
}

inline LrnWindow make_window(const View& x, const LrnParams& p) {
  LrnWindow w = {};
  w.channels = to_int(x.size[1], "the number of channels"),
  w.group_channels = w.channels / p.groups;
  w.before = std::min(p.size / 2, w.group_channels);
  w.after = std::min(p.size - 1 - p.size / 2, w.group_channels);
  w.scale = p.scale, w.beta = p.beta, w.k = p.k;
  w.by_group = fast_divide(w.group_channels);
  return w;
}
inline bool is_alexnet(const LrnParams& p) { return p.size == 5 && p.beta == 0.75f; }

inline PoolAxis make_axis(const PoolParams& p, int axis, long long size, long long out) {
  PoolAxis a = {};
  a.size = to_int(size, "a side of the input"), a.out = to_int(out, "a side of the output");
  a.kernel = p.kernel[axis], a.stride = p.stride[axis], a.padding = p.padding[axis],
  a.dilation = p.dilation[axis];
  a.by_stride = fast_divide(a.stride), a.by_dilation = fast_divide(a.dilation);
  return a;
}
inline PoolWindow make_pool_window(const PoolParams& p, const View& input, const View& output) {
  return {make_axis(p, 0, input.size[2], output.size[2]),
          make_axis(p, 1, input.size[3], output.size[3])};
}

// Threads an H100 keeps resident: fewer than this, and work is cut finer.
constexpr long long kResidentThreads = 132 * 2048;

// Values a 16-byte access holds.
inline int wide_values(DType dtype) { return 16 / bytes_of(dtype); }

}  // namespace fastalex
