// The register-blocked matrix products under every convolution: C += A B and C += A^T B.
#include "gemm.h"

#include <array>
#include <utility>

#include "../../vec.h"
#include "inline.h"
#include "pairs.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

using conv::GemmCall;
using conv::kBlock;
using conv::OuterCall;
using conv::Segment;

inline constexpr int kLane = kLanes<float>;

// The distance of A's rows: a constant where the operand is stored in channel blocks.
template <int kStride>
struct FixedStride {
  static constexpr bool kBlocked = true;
  explicit FixedStride(ptrdiff_t) {}
  constexpr operator ptrdiff_t() const { return kStride; }
};
struct RuntimeStride {
  static constexpr bool kBlocked = false;
  ptrdiff_t value;
  operator ptrdiff_t() const { return value; }
};

// What a term of the inner product is: a product, or the sum of a pair's.
struct Single {
  FASTALEX_INLINE static F32 add(F32 sum, F32 a, F32 b) { return fused_multiply_add(a, b, sum); }
};
#if defined(__AVX512F__)
struct Pair {
  FASTALEX_INLINE static F32 add(F32 sum, F32 a, F32 b) { return add_pair_products(sum, a, b); }
};
#endif

// Rows are addressed in threes from one pointer each (base + {0, 1, 2} * stride): few registers.
inline constexpr int kRowsPerPointer = 3;

template <class Term, int kRows, int kVectors, class Stride>
FASTALEX_INLINE void multiply_segment(F32 (&sums)[kRows][kVectors], const float* a, Stride stride,
                                      int terms, const float* b) {
  const float* groups[(kRows + kRowsPerPointer - 1) / kRowsPerPointer];
#pragma GCC unroll 8
  for (int g = 0; g * kRowsPerPointer < kRows; ++g) groups[g] = a + g * kRowsPerPointer * stride;
#pragma GCC unroll 2
  for (int t = 0; t < terms; ++t) {
    F32 row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      row[v] = load(b + (static_cast<ptrdiff_t>(t) * kVectors + v) * kLane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const F32 value = splat(groups[i / kRowsPerPointer] + (i % kRowsPerPointer) * stride + t);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = Term::add(sums[i][v], value, row[v]);
      }
    }
  }
}

// The next block's rows of a segment are short runs a hardware prefetcher does not follow.
template <int kRows>
FASTALEX_INLINE void prefetch_rows(const float* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) __builtin_prefetch(rows + i * kBlock);
}

template <class Term, int kRows, int kVectors, class Stride>
void multiply_block(const GemmCall& call, const float* a, float* c) {
  const Stride stride{call.row_stride};
  F32 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] = F32{};
  }
  const float* b = call.b;
  for (int s = 0; s < call.segment_count; ++s) {
    const Segment& segment = call.segments[s];
    if constexpr (Stride::kBlocked) prefetch_rows<kRows>(a + segment.offset + kRows * kBlock);
    if (Stride::kBlocked && segment.length == kBlock) {
      // A trip count the compiler knows: no remainder to test for.
      multiply_segment<Term, kRows, kVectors>(sums, a + segment.offset, stride, kBlock, b);
    } else {
      multiply_segment<Term, kRows, kVectors>(sums, a + segment.offset, stride, segment.length, b);
    }
    b += static_cast<ptrdiff_t>(segment.length) * kVectors * kLane;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* target = c + i * call.c_stride + v * kLane;
      F32 sum = sums[i][v];
      if (call.accumulate) sum += load(target);
      if (call.bias) sum += load(call.bias + v * kLane);
      if (call.relu) sum = at_least(sum, F32{});
      store(target, sum);
    }
  }
}

using BlockKernel = void (*)(const GemmCall&, const float* a, float* c);

template <class Term, int kVectors, class Stride, int... kRows>
constexpr auto block_kernels(std::integer_sequence<int, kRows...>) {
  return std::array<BlockKernel, sizeof...(kRows)>{
      multiply_block<Term, kRows + 1, kVectors, Stride>...};
}

template <class Term, int kVectors, class Stride>
void multiply_rows(const GemmCall& call) {
  static constexpr auto kernels =
      block_kernels<Term, kVectors, Stride>(std::make_integer_sequence<int, kMaxRows>{});
  const int64_t blocks = (call.rows + kMaxRows - 1) / kMaxRows;
  const float* a = call.a;
  float* c = call.c;
  for (int64_t block = 0; block < blocks; ++block) {
    // Near-equal blocks: 29 rows are 10 + 10 + 9, not 14 + 14 + 1.
    const int rows =
        static_cast<int>(call.rows * (block + 1) / blocks - call.rows * block / blocks);
    kernels[rows - 1](call, a, c);
    a += rows * call.row_stride;
    c += rows * call.c_stride;
  }
}

// A^T B: half a channel block per register block, so that blocked operands are never split
// unevenly.
#if defined(__AVX512F__)
inline constexpr int kOuterColumns = 8;
#else
inline constexpr int kOuterColumns = 4;
#endif

template <int kColumns, int kVectors>
void outer_block(const OuterCall& call, const float* a, float* c) {
  F32 sums[kColumns][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] = F32{};
  }
  const float* b = call.b;
  for (int s = 0; s < call.segment_count; ++s) {
    const float* row = a + call.segments[s].offset;
#pragma GCC unroll 2
    for (int t = 0; t < call.segments[s].length; ++t, row += call.step, b += kVectors * kLane) {
      F32 values[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) values[v] = load(b + v * kLane);
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) {
        const F32 value = splat(row + i);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          sums[i][v] = fused_multiply_add(value, values[v], sums[i][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* target = c + i * call.c_stride + v * kLane;
      store(target, call.accumulate ? load(target) + sums[i][v] : sums[i][v]);
    }
  }
}

using OuterKernel = void (*)(const OuterCall&, const float* a, float* c);

template <int kVectors, int... kColumns>
constexpr auto outer_kernels(std::integer_sequence<int, kColumns...>) {
  return std::array<OuterKernel, sizeof...(kColumns)>{outer_block<kColumns + 1, kVectors>...};
}

template <int kVectors>
void outer_columns(const OuterCall& call) {
  static constexpr auto kernels =
      outer_kernels<kVectors>(std::make_integer_sequence<int, kOuterColumns>{});
  for (int first = 0; first < call.columns; first += kOuterColumns) {
    const int columns = call.columns - first < kOuterColumns ? call.columns - first : kOuterColumns;
    kernels[columns - 1](call, call.a + first, call.c + first * call.c_stride);
  }
}

}  // namespace

void gemm(const GemmCall& call) {
#if defined(__AVX512F__)
  if (call.pairs) {
    return call.vectors == 2 ? multiply_rows<Pair, 2, RuntimeStride>(call)
                             : multiply_rows<Pair, 1, RuntimeStride>(call);
  }
#endif
  const bool blocked = call.row_stride == kBlock;
  if (call.vectors == 2) {
    blocked ? multiply_rows<Single, 2, FixedStride<kBlock>>(call)
            : multiply_rows<Single, 2, RuntimeStride>(call);
  } else {
    blocked ? multiply_rows<Single, 1, FixedStride<kBlock>>(call)
            : multiply_rows<Single, 1, RuntimeStride>(call);
  }
}

void outer(const OuterCall& call) {
  call.vectors == 2 ? outer_columns<2>(call) : outer_columns<1>(call);
}

}  // namespace fastalex::cpu::FASTALEX_ISA
