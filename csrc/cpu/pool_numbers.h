// Reads normalization and pooling off the numbers of a call, and checks them.
#pragma once
#include "numbers.h"

namespace fastalex::cpu {

inline constexpr int64_t kLrnNumbers = 5, kPoolNumbers = 8;

inline void check_lrn(const LrnParams& lrn, int64_t channels) {
  require(lrn.size > 0, "size must be positive, got ", lrn.size);
  require(lrn.groups > 0 && channels % lrn.groups == 0, channels, " channels do not divide into ",
          lrn.groups, " groups");
}

inline LrnParams take_unchecked_lrn(Numbers& numbers) {
  return {.size = numbers.integer(),
          .scale = numbers.real(),
          .beta = numbers.real(),
          .k = numbers.real(),
          .groups = numbers.integer()};
}

inline LrnParams take_lrn(Numbers& numbers, int64_t channels) {
  const LrnParams lrn = take_unchecked_lrn(numbers);
  check_lrn(lrn, channels);
  return lrn;
}

inline PoolParams take_pool(Numbers& numbers) {
  const PoolParams pool{.kernel_h = numbers.integer(),
                        .kernel_w = numbers.integer(),
                        .stride_h = numbers.integer(),
                        .stride_w = numbers.integer(),
                        .padding_h = numbers.integer(),
                        .padding_w = numbers.integer(),
                        .dilation_h = numbers.integer(),
                        .dilation_w = numbers.integer()};
  require(pool.kernel_h > 0 && pool.kernel_w > 0 && pool.stride_h > 0 && pool.stride_w > 0 &&
              pool.dilation_h > 0 && pool.dilation_w > 0 && pool.padding_h >= 0 &&
              pool.padding_w >= 0,
          "pooling takes positive kernel, stride and dilation, and padding >= 0");
  require(pool.padding_h <= pool.kernel_h / 2 && pool.padding_w <= pool.kernel_w / 2,
          "padding is at most half the kernel");
  constexpr int64_t kLimit = int64_t{1} << 31;  // products of two then fit 64 bits
  require(pool.kernel_h < kLimit && pool.kernel_w < kLimit && pool.stride_h < kLimit &&
              pool.stride_w < kLimit && pool.dilation_h < kLimit && pool.dilation_w < kLimit,
          "pooling takes kernel, stride and dilation below 2^31");
  return pool;
}

inline PoolParams take_undilated_pool(Numbers& numbers) {
  const PoolParams pool = take_pool(numbers);
  require(pool.dilation_h == 1 && pool.dilation_w == 1, "lrn_max_pool has no dilation");
  return pool;
}

inline int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                           int64_t dilation, bool ceil_mode) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  require(room >= 0 || (ceil_mode && room > -stride), "kernel larger than input");
  int64_t windows = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // ceil_mode drops a last window that starts in the padding beyond the input.
  if (ceil_mode && (windows - 1) * stride >= size + padding) --windows;
  require(windows > 0, "kernel larger than input");
  return windows;
}

}  // namespace fastalex::cpu
