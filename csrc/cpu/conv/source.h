// Reads rows of the caller's input as the engines want them: float, channels last, folded.
#pragma once
#include <array>

#include "part.h"
#include "scalar.h"

namespace fastalex::cpu::conv {

// Memory that will be read soon.
struct Span {
  const char* data = nullptr;
  int64_t bytes = 0;

  Span share(int64_t index, int64_t count) const {
    const int64_t begin = bytes * index / count;
    return {data + begin, bytes * (index + 1) / count - begin};
  }
  void fetch() const {
    constexpr int64_t kLine = 64;
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(data + at, 0, 2);
  }
};

class InputSource {
 public:
  InputSource(const ConvKernels& kernels, const Geometry& geometry, const Fold& fold, DType dtype,
              const ConstTensor& input, const ConstTensor& mask, const Prologue* prologue = nullptr)
      : kernels_(kernels),
        geometry_(geometry),
        fold_(fold),
        dtype_(dtype),
        input_(input),
        mask_(mask),
        prologue_(prologue) {}

  // True when the engines can read the caller's memory as it is.
  bool in_place() const {
    const Geometry& g = geometry_;
    return dtype_ == DType::kFloat32 && !mask_.data && !prologue_ && fold_.factor == 1 &&
           input_.strides.c == 1 && input_.strides.w == int64_t{g.groups} * g.channels;
  }

  const float* pixel(int64_t image, int group, int y) const {
    const Strides& s = input_.strides;
    return static_cast<const float*>(input_.data) + image * s.n +
           int64_t{group} * geometry_.channels + y * s.h;
  }
  ptrdiff_t pixel_stride() const { return input_.strides.w; }
  ptrdiff_t row_stride() const { return input_.strides.h; }

  // Where the engine's rows [begin, end) lie, if channels last and dense enough to be one run.
  Span memory_of_rows(int64_t image, int group, int begin, int end) const;

  // Row y of the engine's input: out[x * out_stride + channel], zero up to padded_channels.
  void read_row(int64_t image, int group, int y, float* out, ptrdiff_t out_stride,
                int padded_channels) const;
  // Pixels [begin, end) of an unfolded row: out[(x - begin) * channels + channel].
  void read_pixels(int64_t image, int group, int y, int begin, int end, float* out) const {
    const int channels = geometry_.channels;
    gather(image, int64_t{group} * channels, y, begin, 1, end - begin, channels, channels, out,
           channels);
  }
  // Channels [first, first + count) of all pixels of an unfolded row, zero up to `padded`.
  void read_channels(int64_t image, int group, int first, int count, int y, float* out,
                     int64_t padded) const {
    gather(image, int64_t{group} * geometry_.channels + first, y, 0, 1, geometry_.width, count,
           static_cast<int>(padded), out, padded);
  }

 private:
  // Through the prologue where there is one.
  void gather(int64_t image, int64_t channel, int64_t y, int64_t x, int64_t x_step, int64_t pixels,
              int channels, int padded_channels, float* out, ptrdiff_t out_stride) const;
  void gather_from(const ConstTensor& tensor, int64_t image, int64_t channel, int64_t y, int64_t x,
                   int64_t x_step, int64_t pixels, int channels, int padded_channels, float* out,
                   ptrdiff_t out_stride) const;
  void read_folded_row(int64_t image, int group, int y, float* out, ptrdiff_t out_stride) const;

  const ConvKernels& kernels_;
  const Geometry& geometry_;
  const Fold& fold_;
  DType dtype_;
  ConstTensor input_, mask_;
  const Prologue* prologue_;
};

// The last few rows read by one worker, so that overlapping tiles read each row once.
class RowWindow {
 public:
  RowWindow(const InputSource& source, const Geometry& geometry, float* buffer, int slots,
            int padded_channels)
      : source_(source),
        geometry_(geometry),
        buffer_(buffer),
        slots_(slots),
        padded_channels_(padded_channels) {
    keys_.fill(-1);
  }

  static int64_t floats(const Geometry& geometry, int slots, int padded_channels) {
    return int64_t{slots} * geometry.width * padded_channels;
  }

  const float* row(int64_t image, int group, int y) {
    const int slot = y % slots_;
    float* data = buffer_ + int64_t{slot} * geometry_.width * padded_channels_;
    const int64_t key = (image * geometry_.groups + group) * geometry_.height + y;
    if (keys_[slot] != key) {
      source_.read_row(image, group, y, data, padded_channels_, padded_channels_);
      keys_[slot] = key;
    }
    return data;
  }

 private:
  const InputSource& source_;
  const Geometry& geometry_;
  float* buffer_;
  int slots_, padded_channels_;
  std::array<int64_t, kMaxPoints> keys_;
};

}  // namespace fastalex::cpu::conv
