// Transposition of a square of float vectors, for any vector length.
#pragma once
#include <utility>

#include "inline.h"

namespace fastalex::cpu::FASTALEX_ISA {

// {a0, b0, a1, b1, ...} of the lower or the upper halves.
template <bool kUpper, int... kLane>
FASTALEX_INLINE F32 interleave(F32 a, F32 b, std::integer_sequence<int, kLane...>) {
  constexpr int kWidth = kLanes<float>, kFirst = kUpper ? kWidth / 2 : 0;
  return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + (kLane % 2) * kWidth)...);
}

// rows[i][j] becomes rows[j][i]: log2(lanes) perfect shuffles of the square's rows.
FASTALEX_INLINE void transpose(F32 (&rows)[kLanes<float>]) {
  constexpr int kWidth = kLanes<float>;
  constexpr auto kSequence = std::make_integer_sequence<int, kWidth>{};
#pragma GCC unroll 4
  for (int stage = 1; stage < kWidth; stage *= 2) {
    F32 shuffled[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      shuffled[2 * i] = interleave<false>(rows[i], rows[i + kWidth / 2], kSequence);
      shuffled[2 * i + 1] = interleave<true>(rows[i], rows[i + kWidth / 2], kSequence);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = shuffled[i];
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
