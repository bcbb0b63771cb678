// A vector register of float or double, and its loads, stores and widenings, for one instruction
// set.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtypes.h"
#include "isa.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastalex::cpu::FASTALEX_ISA {

// Vec<float> and Vec<double> are the compiler's own vector types: + - * / and comparisons are
// lane-wise, a comparison gives a Mask (all ones or zero per lane), and `mask ? a : b` selects by
// lane.
template <class T>
struct VecType {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecType<T>::type;

template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

using F32 = Vec<float>;
using U32 = Vec<uint32_t>;
using I32 = Vec<int32_t>;
// As many 16-bit or 8-bit values as there are float lanes.
typedef uint16_t U16Half __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t U8Quarter __attribute__((vector_size(kVectorBytes / 4)));

// Whether this processor multiplies pairs of bfloat16 and rounds to them: not every AVX-512 one.
inline bool has_bfloat16_instructions() {
#if defined(__AVX512F__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

template <class T>
inline Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, class T>
inline V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

// --- integers of another width, lane by lane (GCC splits a conversion to or from 512 bits in two)

template <class To, class From>
inline To convert_lanes(From from) {
#if defined(__AVX512BW__)
  using To1 = std::remove_cvref_t<decltype(To{}[0])>;
  using From1 = std::remove_cvref_t<decltype(From{}[0])>;
  if constexpr (sizeof(To) == 64 && sizeof(To1) == 4 && std::is_same_v<From1, uint16_t>) {
    return (To)_mm512_cvtepu16_epi32((__m256i)from);
  } else if constexpr (sizeof(To) == 64 && sizeof(To1) == 4 && std::is_same_v<From1, uint8_t>) {
    return (To)_mm512_cvtepu8_epi32((__m128i)from);
  } else if constexpr (sizeof(From) == 64 && sizeof(From1) == 4 && sizeof(To1) == 2) {
    return (To)_mm512_cvtepi32_epi16((__m512i)from);
  } else if constexpr (sizeof(From) == 64 && sizeof(From1) == 4 && sizeof(To1) == 1) {
    return (To)_mm512_cvtepi32_epi8((__m512i)from);
  }
#endif
  return __builtin_convertvector(from, To);
}

// --- widening to the compute type and narrowing with round-to-nearest-even

inline F32 widen(U16Half half_bits, bfloat16) {
  return bit_cast<F32>(convert_lanes<U32>(half_bits) << 16);
}

inline U16Half narrow(F32 v, bfloat16) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet_nan = (bits >> 16) | 0x40u;  // rounding would carry a NaN's payload into infinity
  return convert_lanes<U16Half>(v == v ? rounded : quiet_nan);
}

inline F32 widen(U16Half half_bits, float16) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)half_bits);
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps((__m128i)half_bits);
#else
  const U32 bits = __builtin_convertvector(half_bits, U32);
  const U32 sign = (bits & 0x8000u) << 16;
  // The scale rebiases the exponent and normalises subnormals in one exact multiplication.
  const F32 magnitude = bit_cast<F32>((bits & 0x7fffu) << 13) * 0x1p112f;
  const U32 finite = bit_cast<U32>(magnitude);
  const U32 special = 0x7f800000u | ((bits & 0x3ffu) << 13);
  return bit_cast<F32>(sign | ((bits & 0x7c00u) == 0x7c00u ? special : finite));
#endif
}

inline U16Half narrow(F32 v, float16) {
#if defined(__AVX512F__)
  return (U16Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (U16Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const U32 bits = bit_cast<U32>(v);
  const U32 sign = (bits >> 16) & 0x8000u;
  const U32 magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns the last kept bit of a half subnormal with the float's, so the addition
  // rounds it.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32 special = magnitude > 0x7f800000u ? (U32{} + 0x7e00u) : (U32{} + 0x7c00u);
  const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector(sign | (magnitude >= 0x47800000u ? special : finite), U16Half);
#endif
}

// --- loads and stores: kLanes<compute_t<S>> elements of storage type S

template <class S>
inline Vec<compute_t<S>> load(const S* p) {
  if constexpr (sizeof(S) == 2) {
    return widen(load_raw<U16Half>(p), S{});
  } else {
    return load_raw<Vec<S>>(p);
  }
}

template <class S>
inline void store(S* p, Vec<compute_t<S>> v) {
  if constexpr (sizeof(S) == 2) {
    const U16Half bits = narrow(v, S{});
    std::memcpy(static_cast<void*>(p), &bits, sizeof(bits));
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// The first `count` elements; the other lanes are zero. 0 <= count <= lanes.
template <class S>
inline Vec<compute_t<S>> load_partial(const S* p, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(S) == 4) {
    return (F32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
  } else if constexpr (sizeof(S) == 2) {
    return widen((U16Half)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), p),
                 S{});
  }
#endif
  S lanes[kLanes<compute_t<S>>] = {};
  std::memcpy(static_cast<void*>(lanes), p, count * sizeof(S));
  return load(lanes);
}

template <class S>
inline void store_partial(S* p, Vec<compute_t<S>> v, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(S) == 4) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)v);
  } else if constexpr (sizeof(S) == 2) {
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1u),
                                    (__m256i)narrow(v, S{}));
  }
#endif
  S lanes[kLanes<compute_t<S>>];
  store(lanes, v);
  std::memcpy(static_cast<void*>(p), lanes, count * sizeof(S));
}

// The first `count` elements, or a full vector where there are that many: the common case, worth
// its branch.
template <class S>
inline Vec<compute_t<S>> load_up_to(const S* p, int64_t count) {
  constexpr int64_t kWidth = kLanes<compute_t<S>>;
  return count >= kWidth ? load(p) : load_partial(p, static_cast<int>(count));
}

template <class S>
inline void store_up_to(S* p, Vec<compute_t<S>> v, int64_t count) {
  constexpr int64_t kWidth = kLanes<compute_t<S>>;
  count >= kWidth ? store(p, v) : store_partial(p, v, static_cast<int>(count));
}

template <class S>
inline compute_t<S> widen_one(S value) {
  if constexpr (sizeof(S) != 2) {
    return value;
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
  } else {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    return load_partial(&value, 1)[0];
#endif
  }
}

// kLanes elements, `stride` apart; reads nothing past the last of them.
template <class S>
inline Vec<compute_t<S>> load_strided(const S* p, int64_t stride) {
  using A = compute_t<S>;
  constexpr int kWidth = kLanes<A>;
  if (stride == 1) return load(p);
  if (stride == 2) {
#if defined(__AVX512BW__)
    if constexpr (std::is_same_v<S, bfloat16>) {  // the low halves of words
      constexpr __mmask32 kAllButLastHigh = 0x7fffffff;
      return (F32)_mm512_slli_epi32(_mm512_maskz_loadu_epi16(kAllButLastHigh, p), 16);
    }
#endif
    // The second load starts one early, so that it ends with the last element wanted.
    const Vec<A> low = load(p), high = load(p + kWidth - 1);
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
      return __builtin_shufflevector(low, high,
                                     (2 * kLane < kWidth ? 2 * kLane : 2 * kLane + 1)...);
    }(std::make_integer_sequence<int, kWidth>{});
  }
  Vec<A> v;
  for (int lane = 0; lane < kWidth; ++lane) v[lane] = widen_one(p[lane * stride]);
  return v;
}

// Small integers of another width, one a lane: `count` of them where fewer than a vector are left.
template <class M, class T>
inline M load_lanes(const T* p, int64_t count) {
  constexpr int kWidth = sizeof(M) / sizeof(M{}[0]);
  typedef T Narrow __attribute__((vector_size(kWidth * sizeof(T))));
  Narrow narrow{};
  if (count >= kWidth) {
    std::memcpy(&narrow, p, sizeof(narrow));
  } else {
    std::memcpy(&narrow, p, count * sizeof(T));
  }
  return convert_lanes<M>(narrow);
}

template <class T, class M>
inline void store_lanes(T* p, M lanes, int64_t count) {
  constexpr int kWidth = sizeof(M) / sizeof(M{}[0]);
  typedef T Narrow __attribute__((vector_size(kWidth * sizeof(T))));
  const Narrow narrow = convert_lanes<Narrow>(lanes);
  if (count >= kWidth) {
    std::memcpy(p, &narrow, sizeof(narrow));
  } else {
    std::memcpy(p, &narrow, count * sizeof(T));
  }
}

// --- lanes of two adjacent vectors

// Lane i holds what stands kShift lanes before lane i of `current`, in memory order.
template <int kShift, class V>
inline V lanes_before(V previous, V current) {
  constexpr int kWidth = sizeof(V) / sizeof(current[0]);
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) {  // half the latency of the permutation GCC picks, and no copy
    return (V)_mm512_alignr_epi32((__m512i)current, (__m512i)previous, kWidth - kShift);
  }
#endif
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(previous, current, (kWidth - kShift + kLane)...);
  }(std::make_integer_sequence<int, kWidth>{});
}

template <int kShift, class V>
inline V lanes_after(V current, V next) {
  constexpr int kWidth = sizeof(V) / sizeof(current[0]);
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) {
    return (V)_mm512_alignr_epi32((__m512i)next, (__m512i)current, kShift);
  }
#endif
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(current, next, (kShift + kLane)...);
  }(std::make_integer_sequence<int, kWidth>{});
}

// The first `count` lanes; zero in the others.
template <class T>
inline Vec<T> keep_first(Vec<T> v, int64_t count) {
  Mask<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < Mask<T>{} + static_cast<int>(count) ? v : Vec<T>{};
}

// --- arithmetic the operators do not spell

template <class V>
inline V fused_multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(c[0]) == 4) {
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(c[0]) == 4) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#else
  return a * b +
         c;  // without the instruction, a correctly rounded fma would be a library call a lane
#endif
}

template <class T>
inline Vec<T> square_root(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_sqrt_ps((__m512)v);
  } else {
    return (Vec<T>)_mm512_sqrt_pd((__m512d)v);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_sqrt_ps((__m256)v);
  } else {
    return (Vec<T>)_mm256_sqrt_pd((__m256d)v);
  }
#else
  for (int lane = 0; lane < kLanes<T>; ++lane) v[lane] = std::sqrt(v[lane]);
  return v;
#endif
}

// a > b ? a : b: b where either is NaN.
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  } else {
    return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  } else {
    return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
  }
#else
  return a > b ? a : b;
#endif
}

// True when every lane of a comparison's result is set.
template <class M>
inline bool all(M mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) == -1;
#else
  const auto words = bit_cast<VecType<uint64_t>::type>(mask);
  return (words[0] & words[1]) == ~uint64_t{0};
#endif
}

// Remembers whether a vector it saw had a lane that fast paths do not serve.
template <class T>
class StrangeValues {
 public:
#if defined(__AVX512F__)
  void see_nans(Vec<T> a, Vec<T> b) {
    if constexpr (sizeof(T) == 4) {
      seen_ |= _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q);
    } else {
      seen_ |= _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_UNORD_Q);
    }
  }
  // By integers, for which there are execution units to spare: what is NaN, zero, infinite,
  // subnormal or negative lies further above the least normal number than the largest does.
  void see_unless_positive_normal(F32 v) {
    const __m512i above = _mm512_sub_epi32((__m512i)v, _mm512_set1_epi32(0x00800000));
    farthest_ = _mm512_max_epu32(farthest_, above);
  }
  bool any() const {
    return (seen_ | _mm512_cmpgt_epu32_mask(farthest_, _mm512_set1_epi32(0x7effffff))) != 0;
  }

 private:
  unsigned seen_ = 0;
  __m512i farthest_ = _mm512_setzero_si512();
#else
  void see_nans(Vec<T> a, Vec<T> b) { ordinary_ &= (a == a) & (b == b); }
  void see_unless_positive_normal(F32 v) { ordinary_ &= (v >= FLT_MIN) & (v <= FLT_MAX); }
  bool any() const { return !all(ordinary_); }

 private:
  Mask<T> ordinary_ = Vec<T>{} == Vec<T>{};
#endif
};

}  // namespace fastalex::cpu::FASTALEX_ISA
