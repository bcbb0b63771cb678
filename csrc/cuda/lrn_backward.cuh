// gx_c = g_c s_c^-beta - 2 scale beta x_c * (sum of g_j x_j s_j^(-beta-1) over the windows j that
// hold c), s from x again. Bytes: x and g read, gx written, nothing saved by forward. With Pooled,
// g is gathered through max-pooling's offsets.
#pragma once

#include "lrn.cuh"
#include "pool_window.cuh"

namespace fastalex {

struct LrnBackwardPlan {
  LrnPlan lrn;  // y: the gradient of x
  const void* grad;
  Strides grad_stride;
  int halo_low, halo_high;  // packs of neighbours at each end of a block (channels last)
  PoolGradient pool;
};

template <class T, int V, bool Pooled>
__device__ __forceinline__ void incoming_gradient(const LrnBackwardPlan& p, long long image,
                                                  int row, int column, int channel, float (&g)[V]) {
  if constexpr (Pooled) {
    gather_pool_gradient<T, V, 0>(p.pool, image, row, column, channel, g);
  } else {
    load_values(static_cast<const T*>(p.grad) + image * p.grad_stride.image +
                    channel * p.grad_stride.channel + row * p.grad_stride.row +
                    column * p.grad_stride.column,
                g);
  }
}

struct GradientTerms {
  float direct;  // g s^-beta
  float cross;   // g x s^(-beta-1)
};
template <int Size>
__device__ __forceinline__ GradientTerms gradient_terms(const LrnWindow& w, float g, float x,
                                                        float squares) {
  const InversePowers s = inverse_powers<Size>(w, lrn_sum(w, squares));
  return {g * s.power, g * x * s.next};
}
__device__ __forceinline__ float input_gradient(const LrnWindow& w, float direct, float x,
                                                float crosses) {
  return fmaf(-2.0f * w.scale * w.beta * x, crosses, direct);
}

// Channels side by side: threads exchange their cross terms through shared memory; the packs at a
// block's two ends only contribute, and are the next block's own work.
template <class T, int V, int Size, bool Pooled>
__global__ void __launch_bounds__(kLrnThreads) lrn_backward_channels_last(const LrnBackwardPlan p) {
  constexpr int kWord = V < 4 ? V : 4,
                kWords = V / kWord;  // 16-byte words, a plane each: no bank conflict
  float* crosses = reinterpret_cast<float*>(dynamic_shared());
  const LrnWindow& w = p.lrn.window;
  const int image = p.lrn.by_blocks(blockIdx.x),
            block = blockIdx.x - image * p.lrn.by_blocks.divisor;
  const int own = kLrnThreads - p.halo_low - p.halo_high;
  const int thread = threadIdx.x, item = block * own + thread - p.halo_low;
  const bool inside = item >= 0 && item < p.lrn.items;
  const int pixel = inside ? p.lrn.by_packs(item) : 0,
            channel = inside ? (item - pixel * p.lrn.packs) * V : 0;
  const int row = p.lrn.by_columns(pixel),
            column = pixel - row * static_cast<int>(p.lrn.by_columns.divisor);

  float x[V] = {}, direct[V] = {}, cross[V] = {};
  if (inside) {
    const Strides& s = p.lrn.x_stride;
    float g[V], squares[V];
    incoming_gradient<T, V, Pooled>(p, image, row, column, channel, g);
    channel_window_sums<T, V, Size>(
        w, static_cast<const T*>(p.lrn.x) + image * s.image + row * s.row + column * s.column, 1,
        channel, x, squares);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const GradientTerms terms = gradient_terms<Size>(w, g[i], x[i], squares[i]);
      direct[i] = terms.direct, cross[i] = terms.cross;
    }
  }
#pragma unroll
  for (int k = 0; k < kWords; k++) {
    float word[kWord];
#pragma unroll
    for (int i = 0; i < kWord; i++) word[i] = cross[k * kWord + i];
    store_shared_values(crosses + (k * kLrnThreads + thread) * kWord, word);
  }
  __syncthreads();
  if (!inside || thread < p.halo_low || thread >= kLrnThreads - p.halo_high) return;

  const ChannelRange group = group_of(w, channel);
  const int before = reach_after<Size>(w),
            after = reach_before<Size>(w);  // the mirror image of the window
  float total[V] = {};
#pragma unroll(Size ? 8 : 1)
  for (int pack = -round_up(before, V); pack < V + after; pack += V) {
    if (channel + pack < group.begin || channel + pack >= group.end) continue;
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      float word[kWord];
      load_shared_values(crosses + (k * kLrnThreads + thread + pack / V) * kWord, word);
#pragma unroll
      for (int e = 0; e < kWord; e++)
#pragma unroll
        for (int i = 0; i < V; i++) {
          const int distance = pack + k * kWord + e - i;
          if (distance >= -before && distance <= after) total[i] += word[e];
        }
    }
  }
  float out[V];
#pragma unroll
  for (int i = 0; i < V; i++) out[i] = input_gradient(w, direct[i], x[i], total[i]);
  const Strides& s = p.lrn.y_stride;
  store_values(
      static_cast<T*>(p.lrn.y) + image * s.image + row * s.row + column * s.column + channel, out);
}

// Pixels side by side: channel m is normalised and its cross term joins a second running window,
// which completes the gradient of the channel `before` steps behind.
template <class T, int V, int Size, bool Pooled>
__global__ void __launch_bounds__(kLrnThreads)
    lrn_backward_channels_first(const LrnBackwardPlan p) {
  constexpr int kBefore = Size / 2, kAfter = Size - 1 - kBefore;
  const ImageItem at = image_item(p.lrn.by_blocks, p.lrn.items);
  if (!at.inside) return;
  const LrnWindow& w = p.lrn.window;
  const ChannelWalk walk = channel_walk<V>(w, at.item, p.lrn.packs, p.lrn.segment, p.lrn.by_columns,
                                           p.lrn.by_packs, p.lrn.by_segments);
  const Strides &xs = p.lrn.x_stride, &ys = p.lrn.y_stride;
  const T* x = static_cast<const T*>(p.lrn.x) + at.image * xs.image + walk.row * xs.row +
               walk.column * xs.column;
  T* y =
      static_cast<T*>(p.lrn.y) + at.image * ys.image + walk.row * ys.row + walk.column * ys.column;

  RunningWindow<V, Size> window, crosses;
  RunningWindow<V, kBefore + 1> directs;
  window.clear(), crosses.clear(), directs.clear();
  float newest[V];
  const int start = walk.run.begin - kAfter;
  for (int c = start - kBefore; c < start + kAfter; c++) {
    load_in_group(x, xs.channel, c, walk.group, newest);
    window.push(newest);
  }
#pragma unroll 5
  for (int m = start; m < walk.run.end + kBefore; m++) {
    load_in_group(x, xs.channel, m + kAfter, walk.group, newest);
    window.push(newest);
    float g[V] = {}, direct[V] = {}, cross[V] = {};
    if (m >= walk.group.begin && m < walk.group.end) {
      incoming_gradient<T, V, Pooled>(p, at.image, walk.row, walk.column, m, g);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const GradientTerms terms =
            gradient_terms<Size>(w, g[i], window.x[kBefore][i], window.squares(i));
        direct[i] = terms.direct, cross[i] = terms.cross;
      }
    }
    directs.push(direct), crosses.push(cross);
    if (m - kBefore < walk.run.begin) continue;
    float out[V];
#pragma unroll
    for (int i = 0; i < V; i++)
      out[i] = input_gradient(w, directs.x[0][i], window.x[0][i], crosses.total(i));
    store_values(y + (m - kBefore) * ys.channel, out);
  }
}

// Any window, any strides: a thread takes one element and recomputes every sum it needs, O(size^2)
// loads through L1.
template <class T, bool Pooled>
__global__ void __launch_bounds__(kLrnThreads) lrn_backward_direct(const LrnBackwardPlan p) {
  const ImageItem at = image_item(p.lrn.by_blocks, p.lrn.items);
  if (!at.inside) return;
  const LrnWindow& w = p.lrn.window;
  const ChannelWalk walk = channel_walk<1>(w, at.item, p.lrn.packs, p.lrn.segment, p.lrn.by_columns,
                                           p.lrn.by_packs, p.lrn.by_segments);
  const Strides &xs = p.lrn.x_stride, &ys = p.lrn.y_stride;
  const T* x = static_cast<const T*>(p.lrn.x) + at.image * xs.image + walk.row * xs.row +
               walk.column * xs.column;
  T* y =
      static_cast<T*>(p.lrn.y) + at.image * ys.image + walk.row * ys.row + walk.column * ys.column;
  for (int c = walk.run.begin; c < walk.run.end; c++) {
    const int first = max(walk.group.begin, c - w.after),
              last = min(walk.group.end - 1, c + w.before);
    float direct = 0.0f, own = 0.0f, total = 0.0f;
    for (int j = first; j <= last; j++) {
      float g[1], v[1], squares[1];
      incoming_gradient<T, 1, Pooled>(p, at.image, walk.row, walk.column, j, g);
      pixel_window_sums<T, 1>(w, x, xs.channel, j, v, squares);
      const GradientTerms terms = gradient_terms<0>(w, g[0], v[0], squares[0]);
      total += terms.cross;
      if (j == c) direct = terms.direct, own = v[0];
    }
    const float out[1] = {input_gradient(w, direct, own, total)};
    store_values(y + c * ys.channel, out);
  }
}

}  // namespace fastalex
