// grad_weight[k][tap][c] = sum over pixels of dz[pixel][k] * x[pixel at tap][c]: a product of two
// tiles stored by pixel. Pixels are split over blocks; the float32 sums of every split go to a
// workspace and are added in order.
#pragma once

#include "conv_math.cuh"

namespace fastalex {

// Shared rows are pixels. 16-bit rows are swizzled for ldmatrix; float rows are padded by 32 bytes
// instead, so that the single loads of TF32 fragments (4 pixels x 8 channels) fall on 32 banks.
template <class T, int BlockM_, int BlockN_, int WarpM_, int WarpN_, int Stages_>
struct WeightTile {
  static constexpr int BlockM = BlockM_, BlockN = BlockN_, WarpM = WarpM_, WarpN = WarpN_,
                       Stages = Stages_;
  static constexpr int WarpsM = BlockM / WarpM, Threads = 32 * WarpsM * (BlockN / WarpN);
  static constexpr int BlockK = kRowBytes / sizeof(T), Values = 16 / sizeof(T);
  static constexpr int Pad = sizeof(T) == 4 ? 32 : 0;
  static constexpr int PitchM = BlockM * sizeof(T) + Pad, PitchN = BlockN * sizeof(T) + Pad;
  static constexpr int LeftBytes = BlockK * PitchM, StageBytes = LeftBytes + BlockK * PitchN;
  static constexpr int RingBytes = Stages * StageBytes;

  __device__ __forceinline__ static int left(int pixel, int byte) {
    return pixel * PitchM + mixed(pixel, byte);
  }
  __device__ __forceinline__ static int right(int pixel, int byte) {
    return LeftBytes + pixel * PitchN + mixed(pixel, byte);
  }

 private:
  __device__ __forceinline__ static int mixed(int pixel, int byte) {
    return sizeof(T) == 4 ? byte : byte ^ ((pixel & 7) << 4);
  }
};

struct WeightBlock {
  int group, first_row, first_column, first_pixel, last_pixel, split;
};
template <class Tile>
__device__ __forceinline__ WeightBlock weight_block(const ConvWeightPlan& p) {
  const int block = blockIdx.x, line = p.by_column_tiles(block), row = p.by_row_tiles(line),
            split = p.by_groups(row);
  WeightBlock b;
  b.first_column = (block - line * static_cast<int>(p.by_column_tiles.divisor)) * Tile::BlockN;
  b.first_row = (line - row * static_cast<int>(p.by_row_tiles.divisor)) * Tile::BlockM;
  b.group = row - split * static_cast<int>(p.by_groups.divisor);
  b.split = split, b.first_pixel = split * p.split_pixels;
  b.last_pixel = min(b.first_pixel + p.split_pixels, p.pixels);
  return b;
}

// dz: 16-byte copies, its channels are padded.
template <class T, class Tile>
__device__ __forceinline__ void copy_gradient(const ConvWeightPlan& p, const WeightBlock& b,
                                              char* stage, int pixel) {
  constexpr int kChunks = Tile::BlockM / Tile::Values;
#pragma unroll
  for (int i = threadIdx.x; i < Tile::BlockK * kChunks; i += Tile::Threads) {
    const int row = i / kChunks, channel = i % kChunks * Tile::Values;
    const bool valid = pixel + row < b.last_pixel && b.first_row + channel < p.dz_group;
    const T* source = static_cast<const T*>(p.dz) +
                      static_cast<long long>(pixel + row) * p.dz_pitch + b.group * p.dz_group +
                      b.first_row + channel;
    cp_async<16>(shared_address(stage) + Tile::left(row, channel * sizeof(T)), source,
                 valid ? 16 : 0);
  }
}

struct ImagePixel {
  const void* base;
  int row, column;
  bool inside;
};
template <class T>
__device__ __forceinline__ ImagePixel image_pixel(const ConvWeightPlan& p, const WeightBlock& b,
                                                  int pixel) {
  const int line = p.by_out_w(pixel), image = p.by_out_h(line);
  const int row = (line - image * p.h.out) * p.h.stride - p.h.padding;
  const int column = (pixel - line * p.w.out) * p.w.stride - p.w.padding;
  return {static_cast<const T*>(p.x) + image * p.x_stride.image, row, column, pixel < b.last_pixel};
}

struct WeightColumn {
  int row, column, channel;  // the tap's place in the window, and the channel of the group
  bool real;
};
__device__ __forceinline__ WeightColumn weight_column(const ConvWeightPlan& p, int index) {
  const int tap = p.by_channels_in(index), r = p.by_kernel_w(tap);
  return {r * p.h.dilation, (tap - r * p.w.kernel) * p.w.dilation, index - tap * p.channels_in,
          index < p.columns};
}

// The image, `Values` columns at once: asynchronous when they are channels of one pixel, else
// single loads.
template <class T, class Tile, bool Gather>
__device__ __forceinline__ void copy_image(const ConvWeightPlan& p, const WeightBlock& b,
                                           char* stage, int pixel) {
  constexpr int kChunks = Tile::BlockN / Tile::Values;
#pragma unroll
  for (int i = threadIdx.x; i < Tile::BlockK * kChunks; i += Tile::Threads) {
    const int row = Gather ? i % Tile::BlockK : i / kChunks,
              chunk = Gather ? i / Tile::BlockK : i % kChunks;
    const ImagePixel at = image_pixel<T>(p, b, pixel + row);
    const auto source = [&](const WeightColumn& c, bool* valid) {
      const int h = at.row + c.row, w = at.column + c.column;
      *valid = at.inside && c.real && h >= 0 && h < p.h.in && w >= 0 && w < p.w.in;
      return static_cast<const T*>(at.base) + h * p.x_stride.row + w * p.x_stride.column +
             (b.group * p.channels_in + c.channel) * p.x_stride.channel;
    };
    const int column = b.first_column + chunk * Tile::Values, place = Tile::right(row, chunk * 16);
    bool valid;
    if constexpr (!Gather) {
      const T* from = source(weight_column(p, column), &valid);
      cp_async<16>(shared_address(stage) + place, from, valid ? 16 : 0);
    } else {
      Pack<T, Tile::Values> pack;
#pragma unroll
      for (int e = 0; e < Tile::Values; e++) {
        const T* from = source(weight_column(p, column + e), &valid);
        float value[1] = {0.0f};
        if (valid) load_values(from, value);
        pack.value[e] = from_float<T>(value[0]);
      }
      store_shared(reinterpret_cast<uint4*>(stage + place), pack.word);
    }
  }
}

// One tensor-core step of 16-bit values, both sides transposed on the way from shared memory.
template <class Math, class Tile>
struct WeightFragments {
  using T = typename Math::Element;
  static constexpr int M = Tile::WarpM / 16, N = Tile::WarpN / 8,
                       StepPixels = kStepBytes / sizeof(T);
  unsigned a[M][4], b[N / 2][4];

  __device__ __forceinline__ void load(const char* stage, int first, int warp_m, int warp_n) {
    const int lane = threadIdx.x % 32;
    const SharedAddress base = shared_address(stage);
    if constexpr (sizeof(T) == 2) {
      const int pixel_a = first + lane % 8 + lane / 16 * 8, pixel_b = first + lane % 16;
#pragma unroll
      for (int m = 0; m < M; m++)
        ldmatrix_x4_trans(a[m],
                          base + Tile::left(pixel_a, (warp_m + m * 16 + lane / 8 % 2 * 8) * 2));
#pragma unroll
      for (int n = 0; n < N / 2; n++)
        ldmatrix_x4_trans(b[n], base + Tile::right(pixel_b, (warp_n + n * 16 + lane / 16 * 8) * 2));
    } else {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          a[m][e] = load_shared<unsigned>(base +
                                          Tile::left(first + lane % 4 + e / 2 * 4,
                                                     (warp_m + m * 16 + lane / 4 + e % 2 * 8) * 4));
#pragma unroll
      for (int n = 0; n < N / 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          b[n][e] = load_shared<unsigned>(
              base + Tile::right(first + lane % 4 + e % 2 * 4,
                                 (warp_n + n * 16 + lane / 4 + e / 2 * 8) * 4));
    }
#pragma unroll
    for (int m = 0; m < M; m++) Math::prepare(a[m]);
#pragma unroll
    for (int n = 0; n < N / 2; n++) Math::prepare(b[n]);
  }
};

template <class Math, class Tile>
__device__ __forceinline__ void multiply_weight_stage(TensorSums<Math, Tile>& warp,
                                                      const char* stage) {
#pragma unroll
  for (int step = 0; step < 2; step++) {
    WeightFragments<Math, Tile> f;
    f.load(stage, step * f.StepPixels, warp.warp_m, warp.warp_n);
    warp.add(f);
  }
}
template <class Tile>
__device__ __forceinline__ void multiply_weight_stage(FmaWarp<Tile>& warp, const char* stage) {
  using Warp = FmaWarp<Tile>;
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int k = 0; k < Tile::BlockK; k++) {
    float a[Warp::M], b[Warp::N][2];
#pragma unroll
    for (int m = 0; m < Warp::M; m++)
      a[m] = load_shared(reinterpret_cast<const float*>(
          stage + Tile::left(k, (warp.warp_m + m * 8 + lane % 8) * 4)));
#pragma unroll
    for (int n = 0; n < Warp::N; n++)
      load_shared_values(reinterpret_cast<const float*>(
                             stage + Tile::right(k, (warp.warp_n + n * 8 + lane / 8 * 2) * 4)),
                         b[n]);
#pragma unroll
    for (int m = 0; m < Warp::M; m++)
#pragma unroll
      for (int n = 0; n < Warp::N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) warp.sum[m][n][e] = fmaf(a[m], b[n][e], warp.sum[m][n][e]);
  }
}

template <class Math, class Tile, bool Gather>
__global__ void __launch_bounds__(Tile::Threads, 2) conv_weight_grad(const ConvWeightPlan p) {
  using T = typename Math::Element;
  constexpr int kLead = Tile::Stages - 1;
  char* ring = dynamic_shared();
  const WeightBlock b = weight_block<Tile>(p);
  const auto issue = [&](int slot, int tile) {
    const int pixel = b.first_pixel + tile * Tile::BlockK;
    copy_gradient<T, Tile>(p, b, ring + slot * Tile::StageBytes, pixel);
    copy_image<T, Tile, Gather>(p, b, ring + slot * Tile::StageBytes, pixel);
    cp_async_commit();
  };
#pragma unroll 1
  for (int s = 0; s < kLead; s++) issue(s, s);

  typename WarpOf<Math, Tile>::Sums warp;
  const int tiles = (b.last_pixel - b.first_pixel + Tile::BlockK - 1) / Tile::BlockK;
  int read = 0, write = kLead;
#pragma unroll 1
  for (int tile = 0; tile < tiles; tile++) {
    cp_async_wait<kLead - 1>();
    __syncthreads();  // this stage has landed for every thread, and the last one is free
    issue(write, tile + kLead);
    multiply_weight_stage(warp, ring + read * Tile::StageBytes);
    read = read == kLead ? 0 : read + 1, write = write == kLead ? 0 : write + 1;
  }
  cp_async_wait<0>();

  float* out = p.partial +
               (static_cast<long long>(b.split) * p.groups + b.group) * p.channels_out * p.columns;
  warp.for_each_pair([&](int row, int column, const float (&pair)[2]) {
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (b.first_row + row < p.channels_out && b.first_column + column + e < p.columns)
        store_global(out + static_cast<long long>(b.first_row + row) * p.columns + b.first_column +
                         column + e,
                     pair[e]);
  });
}

}  // namespace fastalex
