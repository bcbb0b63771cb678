// Tiles whose Winograd sums met NaN or infinity, recomputed directly so that only true results
// stay.
#include "nonfinite.h"

#include <new>

#include "scalar.h"

namespace fastalex::cpu::conv {
namespace {

// The engine's input pixel, or null outside the caller's map.
class Pixels {
 public:
  Pixels(const Part& part, const Operands& operands) : part_(part), operands_(operands) {}

  bool inside(int y, int x) const {
    const Geometry& g = part_.geometry;
    return y >= 0 && y < g.height && x >= 0 && x < g.width;
  }
  float read(int64_t image, int group, int channel, int y, int x) const {
    const Fold& fold = part_.fold;
    int64_t c = channel, source_y = y, source_x = x;
    int channels = part_.geometry.channels;
    if (fold.factor > 1) {
      const int position = channel / fold.channels;
      c = channel % fold.channels;
      channels = fold.channels;
      source_y = int64_t{y} * fold.factor + position / fold.factor - fold.offset_h;
      source_x = int64_t{x} * fold.factor + position % fold.factor - fold.offset_w;
      if (source_y < 0 || source_y >= fold.height || source_x < 0 || source_x >= fold.width) {
        return 0.0f;
      }
    }
    c += int64_t{group} * channels;
    if (operands_.prologue) return read_through(*operands_.prologue, image, c, source_y, source_x);
    const auto at = [&](const ConstTensor& t) {
      const Strides& s = t.strides;
      return read_element(t.data, operands_.dtype,
                          image * s.n + c * s.c + source_y * s.h + source_x * s.w);
    };
    if (operands_.mask.data && at(operands_.mask) <= 0.0f) return 0.0f;
    return at(operands_.input);
  }

 private:
  float read_through(const Prologue& prologue, int64_t image, int64_t c, int64_t y,
                     int64_t x) const {
    int64_t channel = c;
    auto piece = prologue.pieces.begin();
    for (; channel >= piece->channels; ++piece) channel -= piece->channels;
    const Strides& s = piece->tensor.strides;
    const float value = read_element(piece->tensor.data, operands_.dtype,
                                     image * s.n + channel * s.c + y * s.h + x * s.w) *
                            prologue.gain[c] +
                        prologue.shift[c];
    return prologue.relu && value < 0.0f ? 0.0f : value;
  }

  const Part& part_;
  const Operands& operands_;
};

float output_value(const Part& part, const Operands& operands, const Pixels& pixels, int64_t image,
                   int group, int filter, int y, int x) {
  const Geometry& g = part.geometry;
  float sum = 0.0f;
  for (int ky = 0; ky < g.kernel_h; ++ky) {
    for (int kx = 0; kx < g.kernel_w; ++kx) {
      const int in_y = y * g.stride_h - g.offset_h + ky * g.dilation_h;
      const int in_x = x * g.stride_w - g.offset_w + kx * g.dilation_w;
      if (!pixels.inside(in_y, in_x)) continue;
      for (int c = 0; c < g.channels; ++c) {
        const int64_t at = part.weights.offset(operands.weight.strides, group, filter, c, ky, kx);
        if (at < 0) continue;
        sum += pixels.read(image, group, c, in_y, in_x) *
               read_element(operands.weight.data, operands.dtype, at);
      }
    }
  }
  if (operands.bias) {
    sum += read_element(operands.bias, operands.dtype, int64_t{group} * g.filters + filter);
  }
  if (operands.residual.data) {
    const Strides& s = operands.residual.strides;
    const int64_t channel = int64_t{group} * g.filters + filter;
    sum += read_element(operands.residual.data, operands.dtype,
                        image * s.n + channel * s.c + y * s.h + x * s.w);
  }
  return operands.relu && sum < 0.0f ? 0.0f : sum;
}

void recompute_box(const Part& part, const Operands& operands, const OutputTarget& target,
                   const OutputBox& box) {
  const Pixels pixels(part, operands);
  for (int y = box.y; y < box.y + box.rows; ++y) {
    for (int x = box.x; x < box.x + box.columns; ++x) {
      for (int f = box.filter; f < box.filter + box.filters; ++f) {
        const float value = output_value(part, operands, pixels, box.image, box.group, f, y, x);
        target.write_row(box.image, box.group, f, 1, y, x, 1, &value, 1);
      }
    }
  }
}

// Scratch of the rare path; the common one never allocates.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes)
      : data_(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment}))) {}
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  char* data() { return data_; }

 private:
  char* data_;
};

void recompute_all(const ConvKernels& kernels, const Part& part, const Operands& operands) {
  const Part& direct = *part.fallback;
  AlignedBuffer packed(direct.packed_bytes), scratch(direct.scratch_bytes);
  Operands redo = operands;
  redo.packed = reinterpret_cast<const float*>(packed.data());
  redo.scratch = scratch.data();
  pack_direct(kernels, direct, operands.dtype, operands.weight,
              reinterpret_cast<float*>(packed.data()));
  run_direct(kernels, direct, redo);
}

}  // namespace

void NonfiniteLog::add(const OutputBox& box) {
  const std::lock_guard lock(mutex_);
  if (boxes_.size() < limit_) {
    boxes_.push_back(box);
  } else {
    overflowed_ = true;
  }
}

void recompute_nonfinite(const ConvKernels& kernels, const Part& part, const Operands& operands,
                         const OutputTarget& target, const NonfiniteLog& log) {
  if (log.overflowed()) {
    recompute_all(kernels, part, operands);
    return;
  }
  for (const OutputBox& box : log.boxes()) recompute_box(part, operands, target, box);
}

}  // namespace fastalex::cpu::conv
