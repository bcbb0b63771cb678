// What both weight-gradient engines share: the output gradient's geometry, and writing the results.
#pragma once
#include <cmath>

#include "panels.h"
#include "part.h"
#include "scalar.h"

namespace fastalex::cpu::conv {

// The output gradient, seen as an input whose channels are the filters.
inline Geometry gradient_geometry(const Geometry& g) {
  Geometry out;
  out.images = g.images;
  out.groups = g.groups;
  out.channels = g.filters;
  out.height = g.out_height;
  out.width = g.out_width;
  return out;
}

// sums[width] (+)= the column sums of data[rows][width], rows added in order.
void add_rows(const float* data, int64_t rows, int width, bool accumulate, float* sums);

// Writes taps[tap][width] of one channel to the caller's weight gradient; false if any is not
// finite.
bool write_weight_gradient(const Part& part, const GradientOperands& operands, int group,
                           int filter, int filters, int channel, int width, const float* taps);

// One group's.
void write_bias_gradient(const GradientOperands& operands, const Panels& panels, int group,
                         const float* sums);

}  // namespace fastalex::cpu::conv
