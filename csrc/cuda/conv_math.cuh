// The multiplication of two shared tiles by a warp: tensor cores on half, bfloat16 and TF32, or
// IEEE float32 FMAs.
#pragma once

#include "conv_tile.cuh"

namespace fastalex {

template <class T>
struct HalfMath {
  using Element = T;
  static constexpr bool kAvailable = true;
  __device__ __forceinline__ static void prepare(unsigned (&)[4]) {}
  __device__ __forceinline__ static void multiply(float (&d)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1) {
    mma_m16n8k16<T>(d, a, b0, b1);
  }
};

struct Tf32Math {
  using Element = float;
  static constexpr bool kAvailable = true;
  __device__ __forceinline__ static void prepare(unsigned (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      Pack<float, 1> value;
      value.word = words[i];
      words[i] = to_tf32(value.value[0]);
    }
  }
  __device__ __forceinline__ static void multiply(float (&d)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1) {
    mma_m16n8k8_tf32(d, a, b0, b1);
  }
};

// Sums of a warp's tile on tensor cores, as mma lays them out over lanes.
template <class Math, class Tile_>
struct TensorSums {
  using Tile = Tile_;
  static constexpr int M = Tile::WarpM / 16, N = Tile::WarpN / 8;
  float sum[M][N][4];
  int warp_m, warp_n;

  __device__ __forceinline__ TensorSums() {
    const int warp = threadIdx.x / 32;
    warp_m = warp % Tile::WarpsM * Tile::WarpM, warp_n = warp / Tile::WarpsM * Tile::WarpN;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[m][n][e] = 0.0f;
  }
  template <class Fragments>
  __device__ __forceinline__ void add(const Fragments& f) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
        Math::multiply(sum[m][n], f.a[m], f.b[n / 2][n % 2 * 2], f.b[n / 2][n % 2 * 2 + 1]);
  }
  // Calls visit(row, column, two neighbouring sums) for everything this lane holds.
  template <class Visit>
  __device__ __forceinline__ void for_each_pair(Visit visit) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float pair[2] = {sum[m][n][2 * half], sum[m][n][2 * half + 1]};
          visit(warp_m + m * 16 + half * 8 + lane / 4, warp_n + n * 8 + lane % 4 * 2, pair);
        }
  }
};

// Both tiles stored along depth. A stage holds two steps; fragments of the next step load while one
// multiplies.
template <class Math, class Tile>
struct TensorWarp : TensorSums<Math, Tile> {
  using Sums = TensorSums<Math, Tile>;
  static constexpr bool kTensor = true;
  struct Fragments {
    unsigned a[Sums::M][4], b[Sums::N / 2][4];
  };
  Fragments fragments[2];
  int a_offset[2], b_offset[2];

  __device__ __forceinline__ TensorWarp() {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 2; step++) {
      a_offset[step] = swizzled(this->warp_m + lane % 16, step * kStepBytes + lane / 16 * 16);
      b_offset[step] = Tile::InputBytes + swizzled(this->warp_n + lane % 8 + lane / 16 * 8,
                                                   step * kStepBytes + lane / 8 % 2 * 16);
    }
  }
  __device__ __forceinline__ void load(const char* stage, int step) {
    const SharedAddress base = shared_address(stage);
    Fragments& f = fragments[step];
#pragma unroll
    for (int m = 0; m < Sums::M; m++) {
      ldmatrix_x4(f.a[m], base + a_offset[step] + m * 16 * kRowBytes);
      Math::prepare(f.a[m]);
    }
#pragma unroll
    for (int n = 0; n < Sums::N / 2; n++) {
      ldmatrix_x4(f.b[n], base + b_offset[step] + n * 16 * kRowBytes);
      Math::prepare(f.b[n]);
    }
  }
  __device__ __forceinline__ void multiply(int step) { this->add(fragments[step]); }
};

// The same on FMA units: lanes form 8 rows x 4 pairs of columns, so that every shared load is one
// wavefront.
template <class Tile_>
struct FmaWarp {
  using Tile = Tile_;
  static constexpr bool kTensor = false;
  static constexpr int M = Tile::WarpM / 8, N = Tile::WarpN / 8;
  float sum[M][N][2];
  int warp_m, warp_n;

  __device__ __forceinline__ FmaWarp() {
    const int warp = threadIdx.x / 32;
    warp_m = warp % Tile::WarpsM * Tile::WarpM, warp_n = warp / Tile::WarpsM * Tile::WarpN;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++) sum[m][n][0] = sum[m][n][1] = 0.0f;
  }
  __device__ __forceinline__ void load(const char*, int) {}
  __device__ __forceinline__ void multiply_stage(const char* stage) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int chunk = 0; chunk < kRowBytes; chunk += 16) {
      float a[M][4], b[N][2][4];
#pragma unroll
      for (int m = 0; m < M; m++)
        load_shared_values(
            reinterpret_cast<const float*>(stage + swizzled(warp_m + m * 8 + lane % 8, chunk)),
            a[m]);
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          load_shared_values(
              reinterpret_cast<const float*>(stage + Tile::InputBytes +
                                             swizzled(warp_n + n * 8 + lane / 8 * 2 + e, chunk)),
              b[n][e]);
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) sum[m][n][e] = fmaf(a[m][k], b[n][e][k], sum[m][n][e]);
    }
  }
  template <class Visit>
  __device__ __forceinline__ void for_each_pair(Visit visit) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int m = 0; m < M; m++)
        visit(warp_m + m * 8 + lane % 8, warp_n + n * 8 + lane / 8 * 2, sum[m][n]);
  }
};

struct FmaMath {
  using Element = float;
  static constexpr bool kAvailable = true;
};

template <class Math, class Tile>
struct WarpOf {
  using type = TensorWarp<Math, Tile>;
  using Sums = TensorSums<Math, Tile>;
};
template <class Tile>
struct WarpOf<FmaMath, Tile> {
  using type = FmaWarp<Tile>;
  using Sums = FmaWarp<Tile>;
};

}  // namespace fastalex
