// Inlining and the few vector operations that only the convolution kernels need.
#pragma once
#include "../../vec.h"

#define FASTALEX_INLINE __attribute__((always_inline)) inline

namespace fastalex::cpu::FASTALEX_ISA {

// Every lane = *p, as one load; `Vec{} + *p` would add, for the sake of -0.
FASTALEX_INLINE F32 splat(const float* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_set1_ps(*p);
#elif defined(__AVX2__)
  return (F32)_mm256_broadcast_ss(p);
#else
  return F32{*p, *p, *p, *p};
#endif
}

// max(v, floor) that keeps NaN: the maximum instructions return their second operand then.
FASTALEX_INLINE F32 at_least(F32 v, F32 floor) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_max_ps(0xffff, (__m512)floor, (__m512)v);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)floor, (__m256)v);
#else
  return v < floor ? floor : v;
#endif
}

FASTALEX_INLINE bool any_nan(F32 v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  const __m256 unordered = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  return _mm256_movemask_ps(unordered) != 0;
#else
  const Mask<float> unordered = v != v;
  bool found = false;
  for (int lane = 0; lane < kLanes<float>; ++lane) found |= unordered[lane] != 0;
  return found;
#endif
}

}  // namespace fastalex::cpu::FASTALEX_ISA
