// A vector register of float or double, and its loads, stores and widenings, for one instruction
// set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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

// --- widening to the compute type and narrowing with round-to-nearest-even
// ------------------------------

inline F32 widen(U16Half half_bits, bfloat16) {
  return bit_cast<F32>(__builtin_convertvector(half_bits, U32) << 16);
}

inline U16Half narrow(F32 v, bfloat16) {
  const U32 bits = bit_cast<U32>(v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet_nan = (bits >> 16) | 0x40u;  // rounding would carry a NaN's payload into infinity
  return __builtin_convertvector(v == v ? rounded : quiet_nan, U16Half);
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
// ----------------------------------

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

// --- arithmetic the operators do not spell
// --------------------------------------------------------------

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
  for (int lane = 0; lane < kLanes<T>; ++lane) v[lane] = std::sqrt(v[lane]);
  return v;
}

template <class M>
inline bool any(M mask) {
  M folded = mask;
  bool found = false;
  for (unsigned lane = 0; lane < sizeof(M) / sizeof(mask[0]); ++lane) found |= folded[lane] != 0;
  return found;
}

}  // namespace fastalex::cpu::FASTALEX_ISA
