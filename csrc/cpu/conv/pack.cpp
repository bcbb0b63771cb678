// Weights into the order the kernels read them: by panel of filters, transformed for Winograd.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "panels.h"
#include "workers.h"

namespace fastalex::cpu::conv {
namespace {

// Weights of `valid` filters for one channel: out[tap][width], zero beyond the valid ones.
void read_taps(const Part& part, DType dtype, const ConstTensor& weight, int group, int filter,
               int valid, int channel, int width, float* out) {
  const Geometry& g = part.geometry;
  for (int ky = 0; ky < g.kernel_h; ++ky) {
    for (int kx = 0; kx < g.kernel_w; ++kx, out += width) {
      const int64_t first = part.weights.offset(weight.strides, group, filter, channel, ky, kx);
      const int64_t step = part.weights.transposed ? weight.strides.c : weight.strides.n;
      for (int f = 0; f < width; ++f) {
        out[f] =
            f < valid && first >= 0 ? read_element(weight.data, dtype, first + f * step) : 0.0f;
      }
    }
  }
}

// Two floats as the bfloat16 they were made from, the first in the lower half.
float join(float first, float second) {
  const uint32_t bits =
      std::bit_cast<uint32_t>(first) >> 16 | (std::bit_cast<uint32_t>(second) & 0xffff0000u);
  return std::bit_cast<float>(bits);
}

}  // namespace

// [group][panel][point][channel][panel width]
void pack_winograd(const ConvKernels& kernels, const Part& part, DType dtype,
                   const ConstTensor& weight, float* packed) {
  constexpr int kMaxTaps = 7 * 7, kMaxPanel = 32;
  const Geometry& g = part.geometry;
  const Panels panels{g.filters, kernels.lanes};
  const int points = part.winograd.kernels->points * part.winograd.kernels->points;
  const int slices = static_cast<int>(ceil_div(g.channels, kBlock));
  const int64_t jobs = int64_t{g.groups} * panels.count() * slices;
  parallel_for(jobs, 1, [&](int64_t begin, int64_t end) {
    alignas(kAlignment) float taps[kMaxTaps * kMaxPanel];
    for (int64_t job = begin; job < end; ++job) {
      const int slice = static_cast<int>(job % slices);
      const int panel = static_cast<int>(job / slices % panels.count());
      const int group = static_cast<int>(job / slices / panels.count());
      const int vectors = panels.vectors(panel);
      const int64_t width = int64_t{vectors} * kernels.lanes;
      const int64_t filters_before = int64_t{group} * panels.padded() + panels.first(panel);
      float* out = packed + filters_before * points * g.channels;
      const int last = std::min(g.channels, (slice + 1) * kBlock);
      for (int c = slice * kBlock; c < last; ++c) {
        read_taps(part, dtype, weight, group, panels.first(panel), panels.valid(panel), c,
                  static_cast<int>(width), taps);
        part.winograd.kernels->weights(taps, vectors, out + c * width, g.channels * width);
      }
    }
  });
}

// [group][panel][tap][channel][panel width]
void pack_direct(const ConvKernels& kernels, const Part& part, DType dtype,
                 const ConstTensor& weight, float* packed) {
  const Geometry& g = part.geometry;
  const Panels panels{g.filters, kernels.lanes};
  const int taps = g.kernel_h * g.kernel_w;
  parallel_for(int64_t{g.groups} * panels.count(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(taps) * panels.width()), others(values.size());
    for (int64_t job = begin; job < end; ++job) {
      const int panel = static_cast<int>(job % panels.count());
      const int group = static_cast<int>(job / panels.count());
      const int width = panels.vectors(panel) * kernels.lanes;
      const int64_t filters_before = int64_t{group} * panels.padded() + panels.first(panel);
      float* out = packed + filters_before * taps * g.channels;
      for (int c = 0; c < g.channels; ++c) {
        const auto read = [&](int channel, float* out) {
          read_taps(part, dtype, weight, group, panels.first(panel), panels.valid(panel), channel,
                    width, out);
        };
        if (part.pairs) {
          read(2 * c, values.data());
          read(2 * c + 1, others.data());
          std::transform(values.begin(), values.end(), others.begin(), values.begin(), join);
        } else {
          read(c, values.data());
        }
        for (int t = 0; t < taps; ++t) {
          std::copy_n(values.data() + t * width, width,
                      out + (int64_t{t} * g.channels + c) * width);
        }
      }
    }
  });
}

}  // namespace fastalex::cpu::conv
