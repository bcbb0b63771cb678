// The arithmetic of local response normalization: windows of squares, and the power -beta of their
// sums.
#pragma once

#include "pack.cuh"
#include "view.h"

namespace fastalex {

// Channel c is normalised by s_c = k + scale * sum of x_j^2 over j in [c - before, c + after],
// inside c's group. Template argument Size: 5 fixes the window to five channels and beta to 3/4, 0
// takes both from here.
struct LrnWindow {
  int channels, group_channels, before, after;
  float scale, beta, k;
  FastDivide by_group;
};

template <int Size>
__device__ __forceinline__ int reach_before(const LrnWindow& w) {
  return Size ? Size / 2 : w.before;
}
template <int Size>
__device__ __forceinline__ int reach_after(const LrnWindow& w) {
  return Size ? Size - 1 - Size / 2 : w.after;
}

__device__ __forceinline__ float lrn_sum(const LrnWindow& w, float squares) {
  return fmaf(w.scale, squares, w.k);
}

// s^-beta and s^(-beta-1). With beta = 3/4 and r = s^-1/2 the first is r sqrt(r): 4.5 ulp at most,
// and 0 for s = inf.
struct InversePowers {
  float power, next;
};
template <int Size>
__device__ __forceinline__ InversePowers inverse_powers(const LrnWindow& w, float s) {
  if constexpr (Size != 0) {
    const float root = inverse_root(s), power = root * approximate_root(root);
    return {power, power * root * root};
  } else {
    const float power = powf(s, -w.beta);
    return {power, power / s};
  }
}
template <int Size>
__device__ __forceinline__ float inverse_power(const LrnWindow& w, float s) {
  return inverse_powers<Size>(w, s).power;
}

struct ChannelRange {
  int begin, end;
};
__device__ __forceinline__ ChannelRange group_of(const LrnWindow& w, int channel) {
  const int begin = w.by_group(channel) * w.group_channels;
  return {begin, begin + w.group_channels};
}

__device__ constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

// Sums of squares for V neighbouring channels of one pixel. Neighbours come through L1: all packs
// are asked for at once.
template <class T, int V, int Size>
__device__ __forceinline__ void channel_window_sums(const LrnWindow& w, const T* pixel,
                                                    long long stride, int first, float (&x)[V],
                                                    float (&squares)[V]) {
  const ChannelRange group = group_of(w, first);
  const int before = reach_before<Size>(w), after = reach_after<Size>(w);
#pragma unroll
  for (int i = 0; i < V; i++) squares[i] = 0.0f;
#pragma unroll(Size ? 8 : 1)
  for (int pack = -round_up(before, V); pack < V + after; pack += V) {
    const int channel = first + pack;
    float v[V] = {};
    if (channel >= group.begin && channel < group.end) load_values(pixel + channel * stride, v);
#pragma unroll
    for (int e = 0; e < V; e++)
#pragma unroll
      for (int i = 0; i < V; i++) {
        const int distance = pack + e - i;
        if (distance >= -before && distance <= after) squares[i] = fmaf(v[e], v[e], squares[i]);
      }
    if (pack == 0) {
#pragma unroll
      for (int i = 0; i < V; i++) x[i] = v[i];
    }
  }
}

// The same for one channel of V neighbouring pixels.
template <class T, int V>
__device__ __forceinline__ void pixel_window_sums(const LrnWindow& w, const T* pixels,
                                                  long long stride, int channel, float (&x)[V],
                                                  float (&squares)[V]) {
  const ChannelRange group = group_of(w, channel);
  const int begin = max(group.begin, channel - w.before),
            end = min(group.end, channel + w.after + 1);
#pragma unroll
  for (int i = 0; i < V; i++) squares[i] = 0.0f;
  for (int j = begin; j < end; j++) {
    float v[V];
    load_values(pixels + j * stride, v);
#pragma unroll
    for (int i = 0; i < V; i++) {
      squares[i] = fmaf(v[i], v[i], squares[i]);
      if (j == channel) x[i] = v[i];
    }
  }
}

// Squares of the last Size channels of V pixels, pushed one channel at a time.
template <int V, int Size>
struct RunningWindow {
  float x[Size][V];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < Size; j++)
#pragma unroll
      for (int i = 0; i < V; i++) x[j][i] = 0.0f;
  }
  __device__ __forceinline__ void push(const float (&newest)[V]) {
#pragma unroll
    for (int j = 0; j + 1 < Size; j++)
#pragma unroll
      for (int i = 0; i < V; i++) x[j][i] = x[j + 1][i];
#pragma unroll
    for (int i = 0; i < V; i++) x[Size - 1][i] = newest[i];
  }
  __device__ __forceinline__ float squares(int i) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Size; j++) sum = fmaf(x[j][i], x[j][i], sum);
    return sum;
  }
  __device__ __forceinline__ float total(int i) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Size; j++) sum += x[j][i];
    return sum;
  }
};

// A channel of V pixels, or zeros outside the group: a zero adds nothing to a sum of squares.
template <class T, int V>
__device__ __forceinline__ void load_in_group(const T* pixels, long long stride, int channel,
                                              ChannelRange group, float (&v)[V]) {
#pragma unroll
  for (int i = 0; i < V; i++) v[i] = 0.0f;
  if (channel >= group.begin && channel < group.end) load_values(pixels + channel * stride, v);
}

}  // namespace fastalex
