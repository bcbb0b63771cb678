// Crops of uint8 images, mirrored or not, to y = (x + shift - mean) * scale: each pixel is read
// once and written once.
#include <algorithm>
#include <cstring>

#include "op_entries.h"
#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

constexpr int64_t kWidth = kLanes<float>;

#if defined(__AVX2__)
// Five RGB pixels at a time, and the byte before them. Returns how many pixels of the row are done;
// writes one byte more.
inline int64_t mirror_bytes(const uint8_t* source, int64_t pixels, uint8_t* target) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  int64_t p = 0;
  for (; p + 5 < pixels; p += 5) {
    const Bytes v = load_raw<Bytes>(source + 3 * (pixels - p - 5) - 1);
    const Bytes reversed =
        __builtin_shufflevector(v, v, 13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, 0);
    std::memcpy(target + 3 * p, &reversed, sizeof(reversed));
  }
  return p;
}
#endif

// Pixels in reverse order. The target of bytes has room for one more.
template <class T>
void mirror(const T* source, int64_t pixels, int64_t channels, T* target) {
  if (channels == 3) {  // a constant: the compiler keeps the pixel in registers
    int64_t done = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 1) done = mirror_bytes(source, pixels, target);
#endif
    for (int64_t p = done; p < pixels; ++p) {
      const T* from = source + 3 * (pixels - 1 - p);
      T* to = target + 3 * p;
      const T first = from[0], second = from[1], third = from[2];
      to[0] = first;
      to[1] = second;
      to[2] = third;
    }
    return;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    std::copy_n(source + (pixels - 1 - p) * channels, channels, target + p * channels);
  }
}

void repeat(const float* pixel, int64_t channels, int64_t pixels, float* row) {
  for (int64_t p = 0; p < pixels; ++p) std::copy_n(pixel, channels, row + p * channels);
}

inline F32 load_bytes(const uint8_t* p, int64_t count) {
  U8Quarter bytes{};
  std::memcpy(&bytes, p, count >= kWidth ? kWidth : count);
  return __builtin_convertvector(bytes, F32);
}

// The three operations in this order and unfused are the transform chain's own.
template <class S>
void write_row(const uint8_t* x, const float* shift, const float* mean, float scale, int64_t count,
               S* y) {
  const F32 factor = broadcast(scale);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store(y + i, (load_bytes(x + i, kWidth) + load(shift + i) - load(mean + i)) * factor);
  }
  if (const int64_t rest = count - i; rest > 0) {
    const F32 v =
        load_bytes(x + i, rest) + load_up_to(shift + i, rest) - load_up_to(mean + i, rest);
    store_partial(y + i, v * factor, static_cast<int>(rest));
  }
}

template <class S>
void run(const AugmentCall& call) {
  const int64_t channels = call.channels, count = call.out_width * channels;
  const int64_t gap = (call.pitch - call.out_width) * channels;
  const int64_t mean_row = call.width * channels;
  const bool any_mirrored =
      std::any_of(call.mirrored, call.mirrored + call.batch, [](bool m) { return m; });
  // A mean image is reversed once for all images, not row by row for each.
  Scratch<float> mirrored_mean(call.mean_is_image && any_mirrored ? call.height * mean_row : 0);
  if (call.mean_is_image && any_mirrored) {
    parallel_for(call.height, grain(mean_row), [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) {
        mirror(call.mean + h * mean_row, call.width, channels, mirrored_mean.data() + h * mean_row);
      }
    });
  }
  parallel_for(call.batch * call.out_height, grain(count), [&](int64_t begin, int64_t end) {
    Scratch<uint8_t> reversed(count + 1);
    Scratch<float> shifts(count), means(count);
    if (!call.mean_is_image) repeat(call.mean, channels, call.out_width, means.data());
    int64_t image = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / call.out_height, h = i % call.out_height;
      if (n != image) {
        image = n;
        repeat(call.shift + n * channels, channels, call.out_width, shifts.data());
      }
      const int64_t top = call.corners[2 * n] + h, left = call.corners[2 * n + 1];
      const bool mirrored = call.mirrored[n];
      const uint8_t* x =
          call.images + n * call.batch_stride + top * call.row_stride + left * channels;
      const float* mean = means.data();
      if (mirrored) {
        mirror(x, call.out_width, channels, reversed.data());
        x = reversed.data();
      }
      if (call.mean_is_image) {
        const int64_t column = mirrored ? call.width - left - call.out_width : left;
        mean = (mirrored ? mirrored_mean.data() : call.mean) + top * mean_row + column * channels;
      }
      S* y = static_cast<S*>(call.output) + i * call.pitch * channels;
      write_row(x, shifts.data(), mean, call.scale, count, y);
      std::memset(static_cast<void*>(y + count), 0, gap * sizeof(S));
    }
  });
}

}  // namespace

void augment(const AugmentCall& call) {
  switch (call.dtype) {
    case DType::kBFloat16:
      return run<bfloat16>(call);
    case DType::kFloat16:
      return run<float16>(call);
    default:
      return run<float>(call);
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
