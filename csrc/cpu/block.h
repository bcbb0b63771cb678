// What one register of stored elements widens to. A register of bfloat16 is two vectors, its even
// and its odd elements, each one instruction away: a vector of neighbours would take more.
#pragma once
#include "vec.h"

namespace fastalex::cpu::FASTALEX_ISA {

template <class S>
inline constexpr int kParts = std::is_same_v<S, bfloat16> ? 2 : 1;

// Elements of a block; element i is lane i / kParts of part i % kParts.
template <class S>
inline constexpr int kBlock = kParts<S> * kLanes<compute_t<S>>;

template <class S>
struct Block {
  Vec<compute_t<S>> part[kParts<S>];
};

// The block of what fn gives for each part.
template <class S, class Fn>
inline Block<S> by_part(Fn&& fn) {
  Block<S> block;
  for (int p = 0; p < kParts<S>; ++p) block.part[p] = fn(p);
  return block;
}

// --- bfloat16 in words of two: the even element is the low half

inline Block<bfloat16> widen_words(U32 words) {
  return {bit_cast<F32>(words << 16), bit_cast<F32>(words & 0xffff0000u)};
}

// To the nearest, ties to even; a NaN stays one.
inline U32 narrow_words(const Block<bfloat16>& block) {
  const auto rounded = [](F32 v) {
    const U32 bits = bit_cast<U32>(v);
    const U32 up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return v == v ? up : bits | 0x400000u;
  };
#if defined(__AVX512F__)
  constexpr int kSubnormal = 0x20;  // what the instruction takes for zero
  const auto [even, odd] = block.part;
  const int subnormal = _mm512_fpclass_ps_mask((__m512)even, kSubnormal) |
                        _mm512_fpclass_ps_mask((__m512)odd, kSubnormal);
  if (__builtin_expect(has_bfloat16_instructions() && subnormal == 0, 1)) {
    __m512i halves;  // spelt in assembly because these files are compiled for every AVX-512 machine
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(even), "v"(odd));
    typedef uint16_t U16 __attribute__((vector_size(64)));
    const auto interleaving = []<int... kLane>(std::integer_sequence<int, kLane...>) {
      return U16{(kLane / 2 + kLane % 2 * 16)...};
    }(std::make_integer_sequence<int, 32>{});
    return (U32)_mm512_permutexvar_epi16((__m512i)interleaving, halves);
  }
#endif
  return (rounded(block.part[0]) >> 16) | (rounded(block.part[1]) & 0xffff0000u);
}

// --- loads and stores of a block, or of the first `count` of its elements, the others zero

template <class S>
inline Block<S> load_block(const S* p) {
  if constexpr (kParts<S> == 2) {
    return widen_words(load_raw<U32>(p));
  } else {
    return {load(p)};
  }
}

template <class S>
inline Block<S> load_block_up_to(const S* p, int64_t count) {
  if constexpr (kParts<S> == 1) {
    return {load_up_to(p, count)};
  } else {
    if (count >= kBlock<S>) return load_block(p);
#if defined(__AVX512BW__)
    return widen_words((U32)_mm512_maskz_loadu_epi16((1u << count) - 1u, p));
#else
    S elements[kBlock<S>] = {};
    std::memcpy(static_cast<void*>(elements), p, count * sizeof(S));
    return load_block(elements);
#endif
  }
}

template <class S>
inline void store_block_up_to(S* p, const Block<S>& block, int64_t count) {
  if constexpr (kParts<S> == 1) {
    store_up_to(p, block.part[0], count);
  } else {
    const U32 words = narrow_words(block);
    if (count >= kBlock<S>) {
      std::memcpy(static_cast<void*>(p), &words, sizeof(words));
    } else {
#if defined(__AVX512BW__)
      _mm512_mask_storeu_epi16(p, (1u << count) - 1u, (__m512i)words);
#else
      std::memcpy(static_cast<void*>(p), &words, count * sizeof(S));
#endif
    }
  }
}

// --- what belongs to the elements of a block, in another type

// Lane by lane in memory order: where two vectors stand for a block, one of every other element.
template <class V>
inline std::pair<V, V> interleaved(V even, V odd) {
  constexpr int kWidth = sizeof(V) / sizeof(even[0]);
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    return std::pair{
        __builtin_shufflevector(even, odd, (kLane / 2 + kLane % 2 * kWidth)...),
        __builtin_shufflevector(even, odd, ((kLane + kWidth) / 2 + kLane % 2 * kWidth)...)};
  }(std::make_integer_sequence<int, kWidth>{});
}

// Small integers, one an element: those of part p are part(p).
template <class S, class T, class Fn>
inline void store_block_lanes(T* p, Fn&& part, int64_t count) {
  if constexpr (kParts<S> == 1) {
    store_lanes(p, part(0), count);
  } else {
    constexpr int kWidth = kLanes<compute_t<S>>;
    const auto [low, high] = interleaved(part(0), part(1));
    store_lanes(p, low, count);
    if (count > kWidth) store_lanes(p + kWidth, high, count - kWidth);
  }
}

// The compute type or S itself, as load_split_up_to reads it.
template <class S, class Out>
inline void store_split_up_to(Out* p, const Block<S>& block, int64_t count) {
  if constexpr (std::is_same_v<Out, S>) {
    store_block_up_to(p, block, count);
  } else if constexpr (kParts<S> == 1) {
    store_up_to(p, block.part[0], count);
  } else {
    constexpr int kWidth = kLanes<Out>;
    const auto [low, high] = interleaved(block.part[0], block.part[1]);
    store_up_to(p, low, count);
    if (count > kWidth) store_up_to(p + kWidth, high, count - kWidth);
  }
}

// The elements whose byte is `chosen`, zero for the others.
inline Block<bfloat16> load_chosen(const bfloat16* p, const uint8_t* bytes, int chosen,
                                   int64_t count) {
  typedef uint16_t U16 __attribute__((vector_size(kVectorBytes)));
  typedef uint8_t U8 __attribute__((vector_size(kVectorBytes / 2)));
  U16 elements{};
  U8 choices{};
  if (count >= kBlock<bfloat16>) {
    elements = load_raw<U16>(p);
    choices = load_raw<U8>(bytes);
  } else {
    std::memcpy(&elements, p, count * sizeof(bfloat16));
    std::memcpy(&choices, bytes, count);
  }
#if defined(__AVX512BW__)
  const auto wide = (U16)_mm512_cvtepu8_epi16((__m256i)choices);
  const __mmask32 taken =
      _mm512_cmpeq_epi16_mask((__m512i)wide, _mm512_set1_epi16(static_cast<int16_t>(chosen)));
  return widen_words((U32)_mm512_maskz_mov_epi16(taken, (__m512i)elements));
#else
  const auto wide = __builtin_convertvector(choices, U16);
  const auto taken = wide == static_cast<uint16_t>(chosen);
  return widen_words(bit_cast<U32>(elements & (U16)taken));
#endif
}

// As many elements of another type G, split the same way. G is S or its compute type.
template <class S, class G>
inline Block<S> load_split_up_to(const G* p, int64_t count) {
  if constexpr (kParts<G> == kParts<S>) {
    const Block<G> block = load_block_up_to(p, count);
    return by_part<S>([&](int part) { return block.part[part]; });
  } else {
    constexpr int kWidth = kLanes<G>;
    const Vec<G> low = load_up_to(p, count);
    const Vec<G> high = count > kWidth ? load_up_to(p + kWidth, count - kWidth) : Vec<G>{};
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      return Block<S>{__builtin_shufflevector(low, high, 2 * kLane...),
                      __builtin_shufflevector(low, high, 2 * kLane + 1 ...)};
    }(std::make_integer_sequence<int, kWidth>{});
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
