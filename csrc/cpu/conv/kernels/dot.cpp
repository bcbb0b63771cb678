// Products of matrix rows with matrix rows, read as they lie in memory: a linear layer's forward
// pass.
#include "dot.h"

#include <algorithm>
#include <array>
#include <utility>

#include "../../vec.h"
#include "inline.h"
#include "pairs.h"
#include "transpose.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

using conv::DotCall;

inline constexpr int kLane = kLanes<float>;

// Elements are widened as they are loaded.
template <class S>
struct Widening {
  using Element = S;
  using Operand = F32;
  static constexpr int kStep = kLane;
  FASTALEX_INLINE static F32 read(const S* p) { return load(p); }
  FASTALEX_INLINE static F32 read(const S* p, int count) { return load_partial(p, count); }
  FASTALEX_INLINE static void add(F32& sum, F32 a, F32 b) { sum = fused_multiply_add(a, b, sum); }
};

#if defined(__AVX512F__)
// Pairs of bfloat16 multiplied and added in one instruction, where the CPU has it.
struct Pairing {
  using Element = bfloat16;
  using Operand = __m512i;
  static constexpr int kStep = 2 * kLane;
  FASTALEX_INLINE static __m512i read(const bfloat16* p) { return _mm512_loadu_si512(p); }
  FASTALEX_INLINE static __m512i read(const bfloat16* p, int count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
  }
  FASTALEX_INLINE static void add(F32& sum, __m512i a, __m512i b) {
    sum = add_pair_products(sum, (F32)a, (F32)b);
  }
};
#endif

template <class Arithmetic, int kRows>
struct Block {
  using S = typename Arithmetic::Element;
  F32 sums[kRows][kDotOutputs];

  template <class... Count>
  FASTALEX_INLINE void add(const S* const (&x)[kRows], const S* const (&w)[kDotOutputs], int at,
                           Count... count) {
    typename Arithmetic::Operand values[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) values[r] = Arithmetic::read(x[r] + at, count...);
#pragma GCC unroll 8
    for (int o = 0; o < kDotOutputs; ++o) {
      const auto weights = Arithmetic::read(w[o] + at, count...);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) Arithmetic::add(sums[r][o], values[r], weights);
    }
  }
};

template <class Arithmetic, int kRows>
void multiply_block(const DotCall& call, int64_t row) {
  using S = typename Arithmetic::Element;
  const S *x[kRows], *w[kDotOutputs];
  Block<Arithmetic, kRows> block;
  float* sums = call.sums + row * kDotOutputs * kLane;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const S*>(call.x) + (row + r) * call.x_stride;
#pragma GCC unroll 8
  for (int o = 0; o < kDotOutputs; ++o) {  // past the end, the last row again
    w[o] = static_cast<const S*>(call.w) + std::min(o, call.outputs - 1) * call.w_stride;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) block.sums[r][o] = load(sums + (r * kDotOutputs + o) * kLane);
  }
  int at = 0;
  for (; at + Arithmetic::kStep <= call.length; at += Arithmetic::kStep) block.add(x, w, at);
  if (at < call.length) block.add(x, w, at, call.length - at);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < kDotOutputs; ++o) {
      store(sums + (r * kDotOutputs + o) * kLane, block.sums[r][o]);
    }
  }
}

template <class Arithmetic>
void multiply_rows(const DotCall& call) {
  static constexpr auto kernels = []<int... kRows>(std::integer_sequence<int, kRows...>) {
    return std::array{multiply_block<Arithmetic, kRows + 1>...};
  }(std::make_integer_sequence<int, kDotRows>{});
  for (int64_t row = 0; row < call.rows; row += kDotRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kDotRows, call.rows - row));
    kernels[rows - 1](call, row);
  }
}

}  // namespace

void dot(const DotCall& call) {
  switch (call.dtype) {
    case DType::kBFloat16:
#if defined(__AVX512F__)
      if (has_bfloat16_instructions()) return multiply_rows<Pairing>(call);
#endif
      return multiply_rows<Widening<bfloat16>>(call);
    case DType::kFloat16:
      return multiply_rows<Widening<float16>>(call);
    default:
      return multiply_rows<Widening<float>>(call);
  }
}

void add_lanes(const float* vectors, int64_t count, bool relu, float* out) {
  for (int64_t i = 0; i < count; i += kLane) {
    F32 square[kLane];
    for (int lane = 0; lane < kLane; ++lane) square[lane] = load(vectors + (i + lane) * kLane);
    transpose(square);
    F32 sum = square[0];
    for (int lane = 1; lane < kLane; ++lane) sum += square[lane];
    store(out + i, relu ? at_least(sum, F32{}) : sum);
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
