// The namespace and vector width of a source file that is compiled once per instruction set.
#pragma once

// setup.py compiles every kernel source three times, with -DFASTALEX_ISA=avx512, avx2 or portable
// and the matching machine flags. Everything such a source defines lives in fastalex::cpu::<isa>,
// so that no inline function compiled for one instruction set can be linked into the code of
// another.
#ifndef FASTALEX_ISA
#error "compile kernel sources with -DFASTALEX_ISA=avx512|avx2|portable"
#endif

namespace fastalex::cpu::FASTALEX_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

}  // namespace fastalex::cpu::FASTALEX_ISA
