// Which input a band of outputs reads, and copying it with zeros where it lies outside.
#pragma once
#include <algorithm>

#include "source.h"

namespace fastalex::cpu::conv {

// Rows or columns of input that `count` outputs of one dimension read.
inline int span(int count, int stride, int taps, int dilation) {
  return (count - 1) * stride + (std::max(taps, 1) - 1) * dilation + 1;
}

inline int band_width(const Geometry& g) {
  return span(g.out_width, g.stride_w, g.kernel_w, g.dilation_w);
}
inline int band_height(const Geometry& g, int rows) {
  return span(rows, g.stride_h, g.kernel_h, g.dilation_h);
}

// No tap of any output falls outside the input.
inline bool covered(const Geometry& g) {
  return g.offset_h <= 0 && g.offset_w <= 0 &&
         band_height(g, g.out_height) - g.offset_h <= g.height &&
         band_width(g) - g.offset_w <= g.width;
}

// Input rows [first_y, first_y + rows) as band[row][band_width][channels].
inline void fill_band(const InputSource& source, const Geometry& g, int64_t image, int group,
                      int first_y, int rows, float* band) {
  const int width = band_width(g);
  const int begin = std::clamp(g.offset_w, 0, width);
  const int end = std::clamp(g.width + g.offset_w, begin, width);
  const int64_t row_floats = int64_t{width} * g.channels;
  for (int i = 0; i < rows; ++i, band += row_floats) {
    const int y = first_y + i;
    if (y < 0 || y >= g.height) {
      std::fill_n(band, row_floats, 0.0f);
      continue;
    }
    std::fill_n(band, int64_t{begin} * g.channels, 0.0f);
    if (end > begin) {
      source.read_pixels(image, group, y, begin - g.offset_w, end - g.offset_w,
                         band + int64_t{begin} * g.channels);
    }
    std::fill(band + int64_t{end} * g.channels, band + row_floats, 0.0f);
  }
}

}  // namespace fastalex::cpu::conv
