// How an operator sees a tensor: a pointer, four sizes, four strides; nothing of torch. Shared by
// launchers and tests.
#pragma once

#include "fast_divide.h"

namespace fastalex {

// Element strides of the four axes of an [N, C, H, W] tensor as a kernel uses them.
struct Strides {
  long long image, channel, row, column;
};

#ifndef __CUDACC_RTC__
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

inline int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

struct View {
  void* data;
  long long size[4];    // N, C, H, W
  long long stride[4];  // in elements

  Strides strides() const { return {stride[0], stride[1], stride[2], stride[3]}; }
};

// Channels side by side. One channel, or one pixel an image, may read as both layouts: pixels win
// with one channel.
inline bool channels_are_dense(const View& v) { return v.size[1] > 1 && v.stride[1] == 1; }

inline bool is_aligned(const void* pointer, long long bytes) {
  return reinterpret_cast<unsigned long long>(pointer) % bytes == 0;
}

// Every start of a pack of `values` along the dense axis lies on a multiple of the pack.
inline bool packs_are_aligned(const View& v, int element_bytes, int values, bool channels_last) {
  if (!is_aligned(v.data, static_cast<long long>(element_bytes) * values)) return false;
  const int dense = channels_last ? 1 : 3;
  if (v.size[dense] % values) return false;
  for (int axis = 0; axis < 4; axis++)
    if (axis != dense && v.size[axis] > 1 && v.stride[axis] % values) return false;
  return true;
}

// Makes one long row of all rows.
inline void fold_rows(View& v) {
  if (v.size[3] == 1) v.stride[3] = v.stride[2];
  v.size[3] *= v.size[2], v.size[2] = 1, v.stride[2] = 0;
}
#endif

}  // namespace fastalex
