// Products of pairs of bfloat16, an instruction that not every AVX-512 processor has.
#pragma once
#include "../../vec.h"
#include "inline.h"

namespace fastalex::cpu::FASTALEX_ISA {

#if defined(__AVX512F__)
// sum + a's first of each pair times b's + a's second times b's; subnormal operands count as zero.
// Spelt in assembly because these files are compiled for every AVX-512 machine.
FASTALEX_INLINE F32 add_pair_products(F32 sum, F32 a, F32 b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

}  // namespace fastalex::cpu::FASTALEX_ISA
