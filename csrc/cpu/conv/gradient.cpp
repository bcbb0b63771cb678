// What both weight-gradient engines share: the output gradient's geometry, and writing the results.
#include "gradient.h"

namespace fastalex::cpu::conv {

void add_rows(const float* data, int64_t rows, int width, bool accumulate, float* sums) {
  constexpr int kMaxPanel = 32;
  constexpr int64_t kRowsPerRun = 256;  // partial sums keep the rounding error of a long column low
  for (int64_t first = 0; first < rows || (first == 0 && !accumulate); first += kRowsPerRun) {
    float partial[kMaxPanel] = {};
    const int64_t last = std::min(rows, first + kRowsPerRun);
    for (int64_t row = first; row < last; ++row) {
      for (int i = 0; i < width; ++i) partial[i] += data[row * width + i];
    }
    const bool add = accumulate || first > 0;
    for (int i = 0; i < width; ++i) sums[i] = add ? sums[i] + partial[i] : partial[i];
  }
}

bool write_weight_gradient(const Part& part, const GradientOperands& operands, int group,
                           int filter, int filters, int channel, int width, const float* taps) {
  const Geometry& g = part.geometry;
  const Tensor& out = operands.weight_gradient;
  bool finite = true;
  for (int ky = 0; ky < g.kernel_h; ++ky) {
    for (int kx = 0; kx < g.kernel_w; ++kx, taps += width) {
      const int64_t at = part.weights.offset(out.strides, group, filter, channel, ky, kx);
      if (at < 0) continue;
      for (int f = 0; f < filters; ++f) {
        finite &= std::isfinite(taps[f]);
        write_element(out.data, operands.dtype, at + f * out.strides.n, taps[f]);
      }
    }
  }
  return finite;
}

void write_bias_gradient(const GradientOperands& operands, const Panels& panels, int group,
                         const float* sums) {
  for (int f = 0; f < panels.filters; ++f) {
    write_element(operands.bias_gradient, operands.dtype, int64_t{group} * panels.filters + f,
                  sums[f]);
  }
}

}  // namespace fastalex::cpu::conv
