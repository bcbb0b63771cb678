// A convolution on arrays of exactly the bytes it may touch, and the same by its definition, in
// double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "../../../csrc/cpu/conv/conv.h"
#include "../../../csrc/cpu/conv/scalar.h"

namespace native {

namespace conv = fastalex::cpu::conv;
using fastalex::cpu::DType;

// How the dims of an array [a][b][c][d] follow each other in memory, outermost first.
inline constexpr int kOrders[][4] = {{0, 1, 2, 3}, {0, 2, 3, 1}, {1, 0, 2, 3}, {3, 2, 1, 0}};

// [sizes] in memory that ends with its last element, so that a sanitizer sees a step beyond. Rows
// of the second order (channels last) may be `pitch` pixels longer than they need be.
struct Array {
  int64_t sizes[4];
  conv::Strides strides;
  DType dtype;
  int64_t elements = 1;  // of memory
  std::unique_ptr<char[]> data;

  Array(DType type, int64_t a, int64_t b, int64_t c, int64_t d, int order, int64_t pitch = 0)
      : sizes{a, b, c, d}, dtype(type) {
    int64_t step[4], next = 1, last = 0;
    for (int i = 3; i >= 0; --i) {
      const int dim = kOrders[order][i];
      step[dim] = next;
      next *= std::max<int64_t>(sizes[dim], 1);
      if (order == 1 && dim == 3) next += pitch * step[3];
      last += (std::max<int64_t>(sizes[dim], 1) - 1) * step[dim];
    }
    strides = {step[0], step[1], step[2], step[3]};
    elements = last + 1;
    data.reset(new char[elements * conv::element_size(dtype)]);
    std::memset(data.get(), 0xff, elements * conv::element_size(dtype));  // NaN
  }

  int64_t at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return a * strides.n + b * strides.c + c * strides.h + d * strides.w;
  }
  double read(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return conv::read_element(data.get(), dtype, at(a, b, c, d));
  }
  void write(int64_t a, int64_t b, int64_t c, int64_t d, float value) {
    conv::write_element(data.get(), dtype, at(a, b, c, d), value);
  }
  // Integers in [-2, 2]: sums of them are exact.
  void fill(uint32_t seed) {
    std::minstd_rand random(seed + 1);
    each([&](auto... i) { write(i..., static_cast<float>(static_cast<int>(random() % 5) - 2)); });
  }
  template <class Fn>
  void each(Fn&& fn) const {
    for (int64_t a = 0; a < sizes[0]; ++a) {
      for (int64_t b = 0; b < sizes[1]; ++b) {
        for (int64_t c = 0; c < sizes[2]; ++c) {
          for (int64_t d = 0; d < sizes[3]; ++d) fn(a, b, c, d);
        }
      }
    }
  }
  conv::ConstTensor view() const { return {data.get(), strides}; }
  conv::Tensor target() { return {data.get(), strides}; }
};

struct AlignedBytes {
  explicit AlignedBytes(size_t bytes)
      : data(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))) {
    std::memset(data, 0xff, (bytes + 63) / 64 * 64);
  }
  ~AlignedBytes() { std::free(data); }
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  char* data;
};

// Calls fn(n, k, y, x, c, r, s, h, w): every product of output pixel (y, x) of filter k with input
// pixel (h, w) of the filter's channel c, under tap (r, s); channels count inside the group.
template <class Fn>
void each_product(const conv::Problem& p, Fn&& fn) {
  const int filters = p.out_channels / p.groups, channels = p.in_channels / p.groups;
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int k = 0; k < p.out_channels; ++k) {
      for (int y = 0; y < p.out_height(); ++y) {
        for (int x = 0; x < p.out_width(); ++x) {
          for (int c = 0; c < channels; ++c) {
            for (int r = 0; r < p.kernel_height; ++r) {
              const int h = y * p.stride_height - p.padding_height + r * p.dilation_height;
              if (h < 0 || h >= p.in_height) continue;
              for (int s = 0; s < p.kernel_width; ++s) {
                const int w = x * p.stride_width - p.padding_width + s * p.dilation_width;
                if (w < 0 || w >= p.in_width) continue;
                fn(n, k, y, x, c, r, s, k / filters * channels + c, h, w);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace native
