// Filters in panels of two vectors, and the caller's bias laid out by panel.
#pragma once
#include <algorithm>

#include "part.h"
#include "scalar.h"

namespace fastalex::cpu::conv {

// The filters of one group, in panels of two vectors; the last may have one.
struct Panels {
  int filters, lanes;

  int width() const { return 2 * lanes; }
  int count() const { return static_cast<int>(ceil_div(filters, width())); }
  int first(int panel) const { return panel * width(); }
  int valid(int panel) const { return std::min(width(), filters - first(panel)); }
  int vectors(int panel) const { return valid(panel) > lanes ? 2 : 1; }
  int padded() const { return static_cast<int>(ceil_div(filters, lanes)) * lanes; }
};

// bias[group][padded filters] as float.
inline void read_bias(const Panels& panels, int groups, DType dtype, const void* bias, float* out) {
  for (int g = 0; g < groups; ++g, out += panels.padded()) {
    std::fill_n(out, panels.padded(), 0.0f);
    if (!bias) continue;
    for (int f = 0; f < panels.filters; ++f) {
      out[f] = read_element(bias, dtype, int64_t{g} * panels.filters + f);
    }
  }
}

}  // namespace fastalex::cpu::conv
