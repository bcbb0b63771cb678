// Signatures of csrc/cuda/ptx.cuh: the planner compiles kernels for their names and never runs one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastalex {

using SharedAddress = unsigned;
char* dynamic_shared();
SharedAddress shared_address(const void*);
template <class Word>
Word load_global(const Word*) {
  return {};
}
template <class Word>
void store_global(Word*, Word) {}
template <class Word>
Word load_shared(const Word*) {
  return {};
}
template <class Word>
Word load_shared(SharedAddress) {
  return {};
}
template <class Word>
void store_shared(Word*, Word) {}
inline float inverse_root(float x) { return x; }
inline float approximate_root(float x) { return x; }
inline void ldmatrix_x4(unsigned (&)[4], SharedAddress) {}
inline void ldmatrix_x4_trans(unsigned (&)[4], SharedAddress) {}
template <int>
void cp_async(SharedAddress, const void*, int) {}
inline void cp_async_commit() {}
template <int>
void cp_async_wait() {}
template <class>
void mma_m16n8k16(float (&)[4], const unsigned (&)[4], unsigned, unsigned) {}
inline void mma_m16n8k8_tf32(float (&)[4], const unsigned (&)[4], unsigned, unsigned) {}
inline unsigned to_tf32(float) { return 0; }
inline constexpr bool kHasWgmma = true;
inline void stop_with_error() {}
inline unsigned wgmma_address(SharedAddress tile) { return tile; }
inline void fence_async_proxy() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int, int Columns>
void wgmma_wait(float (&)[Columns][4]) {}
template <class, int Columns>
void wgmma_m64k16(float (&)[Columns][4], unsigned long long, unsigned long long) {}

}  // namespace fastalex
