// Reads rows of the caller's input as the engines want them: float, channels last, folded.
#include "source.h"

#include <algorithm>

namespace fastalex::cpu::conv {

void InputSource::gather(int64_t image, int64_t channel, int64_t y, int64_t x, int64_t x_step,
                         int64_t pixels, int channels, int padded_channels, float* out,
                         ptrdiff_t out_stride) const {
  if (!prologue_) {
    gather_from(input_, image, channel, y, x, x_step, pixels, channels, padded_channels, out,
                out_stride);
    return;
  }
  int64_t begin = 0;  // of a piece, among all channels
  for (const Prologue::Piece& piece : prologue_->pieces) {
    const int64_t end = begin + piece.channels;
    const int64_t first = std::max(begin, channel), last = std::min(end, channel + channels);
    if (first < last) {
      const int count = static_cast<int>(last - first), done = static_cast<int>(first - channel);
      const int padded = done + count == channels ? padded_channels - done : count;
      gather_from(piece.tensor, image, first - begin, y, x, x_step, pixels, count, padded,
                  out + done, out_stride);
      kernels_.affine({out + done, out_stride, pixels, count, prologue_->gain + first,
                       prologue_->shift + first, prologue_->relu});
    }
    begin = end;
  }
}

void InputSource::gather_from(const ConstTensor& tensor, int64_t image, int64_t channel, int64_t y,
                              int64_t x, int64_t x_step, int64_t pixels, int channels,
                              int padded_channels, float* out, ptrdiff_t out_stride) const {
  const auto offset = [&](const Strides& s) {
    return image * s.n + channel * s.c + y * s.h + x * s.w;
  };
  GatherCall call{};
  call.data = element_at(tensor.data, dtype_, offset(tensor.strides));
  call.dtype = dtype_;
  call.pixel_stride = tensor.strides.w * x_step;
  call.channel_stride = tensor.strides.c;
  if (mask_.data) {
    call.mask = element_at(mask_.data, dtype_, offset(mask_.strides));
    call.mask_pixel_stride = mask_.strides.w * x_step;
    call.mask_channel_stride = mask_.strides.c;
  }
  call.pixels = pixels;
  call.channels = channels;
  call.padded_channels = padded_channels;
  call.out = out;
  call.out_stride = out_stride;
  kernels_.gather(call);
}

Span InputSource::memory_of_rows(int64_t image, int group, int begin, int end) const {
  const Fold& fold = fold_;
  const Geometry& g = geometry_;
  const bool folded = fold.factor > 1;
  const int64_t height = folded ? fold.height : g.height;
  const int64_t channels = folded ? fold.channels : g.channels;
  const int64_t first =
      std::clamp<int64_t>(int64_t{begin} * fold.factor - fold.offset_h, 0, height);
  const int64_t last =
      std::clamp<int64_t>(int64_t{end} * fold.factor - fold.offset_h, first, height);
  const Strides& s = input_.strides;
  if (prologue_ || s.c != 1 || s.w != channels) return {};
  const void* data = element_at(input_.data, dtype_, image * s.n + group * channels + first * s.h);
  return {static_cast<const char*>(data),
          (last - first) * s.h * static_cast<int64_t>(element_size(dtype_))};
}

void InputSource::read_row(int64_t image, int group, int y, float* out, ptrdiff_t out_stride,
                           int padded_channels) const {
  const Geometry& g = geometry_;
  if (fold_.factor == 1) {
    gather(image, int64_t{group} * g.channels, y, 0, 1, g.width, g.channels, padded_channels, out,
           out_stride);
    return;
  }
  read_folded_row(image, group, y, out, out_stride);
  for (int64_t x = 0; x < g.width; ++x) {
    std::fill(out + x * out_stride + g.channels, out + x * out_stride + padded_channels, 0.0f);
  }
}

void InputSource::read_folded_row(int64_t image, int group, int y, float* out,
                                  ptrdiff_t out_stride) const {
  const Fold& fold = fold_;
  const int s = fold.factor, channels = fold.channels;
  const int64_t width = geometry_.width;
  const int64_t channel = int64_t{group} * channels;
  // Folded pixels whose s columns all lie inside, and are adjacent in memory, move as one.
  const bool adjacent =
      input_.strides.c == 1 && input_.strides.w == channels && !mask_.data && !prologue_;
  const int64_t whole_begin = std::min(width, ceil_div(fold.offset_w, s));
  const int64_t whole_end =
      adjacent ? std::clamp<int64_t>((fold.width + fold.offset_w) / s, whole_begin, width)
               : whole_begin;
  for (int dy = 0; dy < s; ++dy) {
    const int64_t source_y = int64_t{y} * s + dy - fold.offset_h;
    float* row = out + int64_t{dy} * s * channels;
    if (source_y < 0 || source_y >= fold.height) {
      for (int64_t x = 0; x < width; ++x) {
        std::fill_n(row + x * out_stride, s * channels, 0.0f);
      }
      continue;
    }
    if (whole_end > whole_begin) {
      gather(image, channel, source_y, whole_begin * s - fold.offset_w, s, whole_end - whole_begin,
             s * channels, s * channels, row + whole_begin * out_stride, out_stride);
    }
    for (int dx = 0; dx < s; ++dx) {
      float* column = row + int64_t{dx} * channels;
      const auto read = [&](int64_t begin, int64_t end) {
        const int64_t first = std::clamp<int64_t>(ceil_div(fold.offset_w - dx, s), begin, end);
        const int64_t last =
            std::clamp<int64_t>(ceil_div(fold.width + fold.offset_w - dx, s), first, end);
        for (int64_t x = begin; x < first; ++x) {
          std::fill_n(column + x * out_stride, channels, 0.0f);
        }
        if (last > first) {
          gather(image, channel, source_y, first * s + dx - fold.offset_w, s, last - first,
                 channels, channels, column + first * out_stride, out_stride);
        }
        for (int64_t x = last; x < end; ++x) {
          std::fill_n(column + x * out_stride, channels, 0.0f);
        }
      };
      read(0, whole_begin);
      read(whole_end, width);
    }
  }
}

}  // namespace fastalex::cpu::conv
