// Pixels between the caller's layout and type and the engine's float, channels-last scratch.
#include "copy.h"

#include <algorithm>

#include "../../vec.h"
#include "transpose.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

using conv::AddCall;
using conv::AffineCall;
using conv::GatherCall;
using conv::ScatterCall;

inline constexpr int kLane = kLanes<float>;

template <class S>
inline F32 masked(F32 value, const S* mask, int count) {
  return load_partial(mask, count) <= 0.0f ? F32{} : value;
}

// Channels adjacent and few: each pixel is one partial vector.
template <class S>
void gather_few_channels(const GatherCall& call) {
  const S* in = static_cast<const S*>(call.data);
  float* out = call.out;
  const int channels = call.channels, padded = std::min(kLane, call.padded_channels);
  const int64_t in_stride = call.pixel_stride, out_stride = call.out_stride;
  for (int64_t p = 0; p < call.pixels; ++p, in += in_stride, out += out_stride) {
    store_partial(out, load_partial(in, channels), padded);
  }
}

// Channels adjacent: vectors of channels, pixel by pixel.
template <class S>
void gather_channels_last(const GatherCall& call) {
  const S* in = static_cast<const S*>(call.data);
  const S* mask = static_cast<const S*>(call.mask);
  for (int64_t p = 0; p < call.pixels; ++p) {
    float* out = call.out + p * call.out_stride;
    int c = 0;
    for (; c + kLane <= call.channels; c += kLane) {
      const F32 value = load(in + c);
      store(out + c, mask ? (load(mask + c) <= 0.0f ? F32{} : value) : value);
    }
    const int tail = call.channels - c;
    if (tail > 0) {
      F32 value = load_partial(in + c, tail);
      if (mask) value = masked(value, mask + c, tail);
      store_partial(out + c, value, std::min(kLane, call.padded_channels - c));
      c += kLane;
    }
    for (; c < call.padded_channels; ++c) out[c] = 0.0f;
    in += call.pixel_stride;
    if (mask) mask += call.mask_pixel_stride;
  }
}

// Any strides: a square of pixels and channels at a time, so that both sides stay in cache.
inline constexpr int kSquare = 16;

template <class S>
void gather_strided(const GatherCall& call) {
  const S* in = static_cast<const S*>(call.data);
  const S* mask = static_cast<const S*>(call.mask);
  for (int64_t p0 = 0; p0 < call.pixels; p0 += kSquare) {
    const int64_t p1 = std::min<int64_t>(call.pixels, p0 + kSquare);
    for (int c = 0; c < call.channels; ++c) {
      for (int64_t p = p0; p < p1; ++p) {
        float value = widen_one(in[p * call.pixel_stride + c * call.channel_stride]);
        if (mask) {
          const S* sign = mask + p * call.mask_pixel_stride + c * call.mask_channel_stride;
          if (widen_one(*sign) <= 0.0f) value = 0.0f;
        }
        call.out[p * call.out_stride + c] = value;
      }
    }
    for (int64_t p = p0; p < p1; ++p) {
      float* out = call.out + p * call.out_stride;
      std::fill(out + call.channels, out + call.padded_channels, 0.0f);
    }
  }
}

// Pixels adjacent (NCHW): squares of lanes x lanes, transposed in registers. The mask lies as the
// values do, or with its channels adjacent.
template <class S>
void gather_planes(const GatherCall& call) {
  const S* in = static_cast<const S*>(call.data);
  const S* mask = static_cast<const S*>(call.mask);
  const bool planar_mask = mask && call.mask_pixel_stride == 1;
  for (int c0 = 0; c0 < call.channels; c0 += kLane) {
    const int channels = std::min(kLane, call.channels - c0);
    const int width = std::min(kLane, call.padded_channels - c0);
    for (int64_t p0 = 0; p0 < call.pixels; p0 += kLane) {
      const int64_t pixels = std::min<int64_t>(kLane, call.pixels - p0);
      F32 square[kLane];
      for (int c = 0; c < kLane; ++c) {
        square[c] =
            c < channels ? load_up_to(in + (c0 + c) * call.channel_stride + p0, pixels) : F32{};
        if (planar_mask && c < channels) {
          const S* sign = mask + (c0 + c) * call.mask_channel_stride + p0;
          square[c] = load_up_to(sign, pixels) <= 0.0f ? F32{} : square[c];
        }
      }
      transpose(square);
      for (int64_t p = 0; p < pixels; ++p) {
        if (mask && !planar_mask) {
          const S* sign = mask + (p0 + p) * call.mask_pixel_stride + c0;
          square[p] = load_up_to(sign, channels) <= 0.0f ? F32{} : square[p];
        }
        store_up_to(call.out + (p0 + p) * call.out_stride + c0, square[p], width);
      }
    }
  }
  const int written = (call.channels + kLane - 1) / kLane * kLane;
  for (int64_t p = 0; p < call.pixels && written < call.padded_channels; ++p) {
    float* out = call.out + p * call.out_stride;
    std::fill(out + written, out + call.padded_channels, 0.0f);
  }
}

template <class S>
void scatter_planes(const ScatterCall& call) {
  S* out = static_cast<S*>(call.out);
  for (int c0 = 0; c0 < call.channels; c0 += kLane) {
    const int channels = std::min(kLane, call.channels - c0);
    for (int64_t p0 = 0; p0 < call.pixels; p0 += kLane) {
      const int64_t pixels = std::min<int64_t>(kLane, call.pixels - p0);
      F32 square[kLane];
      for (int64_t p = 0; p < kLane; ++p) {
        square[p] =
            p < pixels ? load_up_to(call.data + (p0 + p) * call.data_stride + c0, channels) : F32{};
      }
      transpose(square);
      for (int c = 0; c < channels; ++c) {
        store_up_to(out + (c0 + c) * call.channel_stride + p0, square[c], pixels);
      }
    }
  }
}

template <class S>
void scatter_channels_last(const ScatterCall& call) {
  S* out = static_cast<S*>(call.out);
  const float* in = call.data;
  for (int64_t p = 0; p < call.pixels; ++p, in += call.data_stride, out += call.pixel_stride) {
    int c = 0;
    for (; c + kLane <= call.channels; c += kLane) store(out + c, load(in + c));
    if (c < call.channels) {
      store_partial(out + c, load_partial(in + c, call.channels - c), call.channels - c);
    }
  }
}

template <class S>
void scatter_strided(const ScatterCall& call) {
  S* out = static_cast<S*>(call.out);
  for (int64_t p0 = 0; p0 < call.pixels; p0 += kSquare) {
    const int64_t p1 = std::min<int64_t>(call.pixels, p0 + kSquare);
    for (int c = 0; c < call.channels; ++c) {
      for (int64_t p = p0; p < p1; ++p) {
        S* target = out + p * call.pixel_stride + c * call.channel_stride;
        const float value = call.data[p * call.data_stride + c];
        if constexpr (sizeof(S) == 4) {
          *target = value;
        } else {
          store_partial(target, broadcast(value), 1);
        }
      }
    }
  }
}

// Channels adjacent: vectors of channels, pixel by pixel.
template <class S>
void add_channels_last(const AddCall& call) {
  const S* in = static_cast<const S*>(call.data);
  float* out = call.out;
  const auto sum = [relu = call.relu](F32 a, F32 b) {
    const F32 value = a + b;
    return relu ? (value < 0.0f ? F32{} : value) : value;
  };
  for (int64_t p = 0; p < call.pixels; ++p, in += call.pixel_stride, out += call.out_stride) {
    int c = 0;
    for (; c + kLane <= call.channels; c += kLane) store(out + c, sum(load(out + c), load(in + c)));
    const int tail = call.channels - c;
    if (tail > 0) {
      store_partial(out + c, sum(load_partial(out + c, tail), load_partial(in + c, tail)), tail);
    }
  }
}

// Any strides: a square at a time is gathered, then added.
void add_strided(const AddCall& call) {
  float square[kSquare * kSquare];
  const int64_t size = call.dtype == DType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
  for (int64_t p = 0; p < call.pixels; p += kSquare) {
    for (int c = 0; c < call.channels; c += kSquare) {
      GatherCall part{};
      part.data = static_cast<const char*>(call.data) +
                  (p * call.pixel_stride + c * call.channel_stride) * size;
      part.dtype = call.dtype;
      part.pixel_stride = call.pixel_stride;
      part.channel_stride = call.channel_stride;
      part.pixels = std::min<int64_t>(kSquare, call.pixels - p);
      part.channels = part.padded_channels = std::min(kSquare, call.channels - c);
      part.out = square;
      part.out_stride = kSquare;
      gather(part);
      AddCall sum = call;
      sum.data = square;
      sum.pixel_stride = kSquare;
      sum.pixels = part.pixels;
      sum.channels = part.channels;
      sum.out = call.out + p * call.out_stride + c;
      add_channels_last<float>(sum);
    }
  }
}

// The engine computes in float; float64 goes to the reference.
template <class Fn>
void visit_float_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(bfloat16{});
    case DType::kFloat16:
      return fn(float16{});
    default:
      return fn(float{});
  }
}

}  // namespace

void gather(const GatherCall& call) {
  const bool adjacent = call.channel_stride == 1 && (!call.mask || call.mask_channel_stride == 1);
  const bool few = call.channels <= kLane && call.padded_channels <= kLane && !call.mask;
  visit_float_dtype(call.dtype, [&]<class S>(S) {
    if (!adjacent) {
      const bool mask_fits =
          !call.mask || call.mask_pixel_stride == 1 || call.mask_channel_stride == 1;
      const bool planes = call.pixel_stride == 1 && mask_fits && call.channels >= kLane / 2;
      return planes ? gather_planes<S>(call) : gather_strided<S>(call);
    }
    few ? gather_few_channels<S>(call) : gather_channels_last<S>(call);
  });
}

void scatter(const ScatterCall& call) {
  visit_float_dtype(call.dtype, [&]<class S>(S) {
    if (call.channel_stride == 1) return scatter_channels_last<S>(call);
    const bool planes = call.pixel_stride == 1 && call.channels >= kLane / 2;
    planes ? scatter_planes<S>(call) : scatter_strided<S>(call);
  });
}

void add(const AddCall& call) {
  if (call.channel_stride != 1) return add_strided(call);
  visit_float_dtype(call.dtype, [&]<class S>(S) { add_channels_last<S>(call); });
}

void affine(const AffineCall& call) {
  for (int c = 0; c < call.channels; c += kLane) {
    const int count = std::min(kLane, call.channels - c);
    const F32 gain = load_up_to(call.gain + c, count), shift = load_up_to(call.shift + c, count);
    const auto change = [&](F32 x) {
      const F32 value = fused_multiply_add(x, gain, shift);
      return call.relu ? (value < 0.0f ? F32{} : value) : value;
    };
    float* at = call.data + c;
    if (count == kLane) {
      for (int64_t p = 0; p < call.pixels; ++p, at += call.stride) store(at, change(load(at)));
    } else {
      for (int64_t p = 0; p < call.pixels; ++p, at += call.stride) {
        store_partial(at, change(load_partial(at, count)), count);
      }
    }
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
