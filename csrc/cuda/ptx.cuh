// Every instruction that CUDA C++ has no word for: PTX here, and a twin of each for g++ in
// tests/support/host_cuda.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastalex {

using SharedAddress = unsigned;

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(1024) char fastalex_shared[];  // what wgmma's swizzles repeat by
  return fastalex_shared;
}

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Read-only data: the compiler may move these loads above stores, which keeps several in flight.
template <class Word>
__device__ __forceinline__ Word load_global(const Word* pointer) {
  return __ldg(pointer);
}
template <class Word>
__device__ __forceinline__ void store_global(Word* pointer, Word word) {
  *pointer = word;
}
template <class Word>
__device__ __forceinline__ Word load_shared(const Word* pointer) {
  return *pointer;
}
template <class Word>
__device__ __forceinline__ void store_shared(Word* pointer, Word word) {
  *pointer = word;
}

// From an address of 32 bits. To a pointer NVRTC adds in 64, where nvcc does not, in registers that
// main loops need.
template <class Word>
__device__ __forceinline__ Word load_shared(SharedAddress address);
template <>
__device__ __forceinline__ unsigned load_shared<unsigned>(SharedAddress address) {
  unsigned word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address));
  return word;
}
template <>
__device__ __forceinline__ uint4 load_shared<uint4>(SharedAddress address) {
  uint4 word;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(address));
  return word;
}

// s^-1/2 within 2 ulp and x^1/2 within 1 ulp, as one instruction each: zeros, infinities and
// denormals included.
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8x8 matrices of 16-bit values; lane 8m+i gives the address of row i of matrix m.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

// Asynchronous global to shared copy: the first `valid` of `Bytes` bytes are read, the others
// become zero.
template <int Bytes>
__device__ __forceinline__ void cp_async(SharedAddress destination, const void* source, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination),
                 "l"(source), "r"(valid));
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(destination),
                 "l"(source), "n"(Bytes), "r"(valid));
  }
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// d += a * b on 16x16 and 16x8 tiles of half or bfloat16, accumulated in float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const unsigned (&a)[4],
                                                     unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4],
                                                            unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same on 16x8 and 8x8 tiles of float32 rounded to TF32 (10 mantissa bits) by to_tf32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                                 unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// --- Hopper: a warpgroup, four warps, multiplies two tiles where they lie in shared memory -------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTALEX_ON_SM90A(...) __VA_ARGS__
inline constexpr bool kHasWgmma = true;
#else  // the instruction is sm_90a's alone: no older GPU has it, and no newer one
#define FASTALEX_ON_SM90A(...)
inline constexpr bool kHasWgmma = false;
#endif

__device__ __forceinline__ void stop_with_error() { __trap(); }

// The address as a matrix descriptor has it.
__device__ __forceinline__ unsigned wgmma_address(SharedAddress tile) { return tile & 0x3ffff; }

// Hands over what this thread wrote to shared memory, its landed copies too: wgmma reads through
// another proxy.
__device__ __forceinline__ void fence_async_proxy() {
  FASTALEX_ON_SM90A(asm volatile("fence.proxy.async.shared::cta;" :: : "memory");)
}
// Hands over the registers of sums; before the products of every group.
__device__ __forceinline__ void wgmma_fence() {
  FASTALEX_ON_SM90A(asm volatile("wgmma.fence.sync.aligned;" :: : "memory");)
}
__device__ __forceinline__ void wgmma_commit() {
  FASTALEX_ON_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory");)
}
// Until at most `Pending` groups run. The sums hold again when none does.
template <int Pending, int Columns>
__device__ __forceinline__ void wgmma_wait(float (&d)[Columns][4]) {
  FASTALEX_ON_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");)
#pragma unroll
  for (int i = 0; i < Columns; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(d[i][e])::"memory");
}

// d += a * b on 64x16 and 16xN tiles, N = 8 * Columns, both K-major and told by descriptors;
// starts, and ends at its wait.
template <class T, int Columns>
__device__ __forceinline__ void wgmma_m64k16(float (&d)[Columns][4], unsigned long long a,
                                             unsigned long long b);

#define FASTALEX_SUM(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FASTALEX_SUMS(i) \
  FASTALEX_SUM(i), FASTALEX_SUM(i + 1), FASTALEX_SUM(i + 2), FASTALEX_SUM(i + 3)
#define FASTALEX_SUMS_64 FASTALEX_SUMS(0), FASTALEX_SUMS(4), FASTALEX_SUMS(8), FASTALEX_SUMS(12)
#define FASTALEX_SUMS_96 FASTALEX_SUMS_64, FASTALEX_SUMS(16), FASTALEX_SUMS(20)
// clang-format off
#define FASTALEX_SLOTS_64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FASTALEX_SLOTS_96 \
  FASTALEX_SLOTS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
// clang-format on
#define FASTALEX_WGMMA(T, Type, N, Columns, Slots, Sums, A, B)                                     \
  template <>                                                                                      \
  __device__ __forceinline__ void wgmma_m64k16<T, Columns>(                                        \
      float (&d)[Columns][4], unsigned long long a, unsigned long long b) {                        \
    FASTALEX_ON_SM90A(asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." Type "." Type  \
                                   " {" Slots "}, %" A ", %" B ", 1, 1, 1, 0, 0;" : Sums : "l"(a), \
                                   "l"(b));)                                                       \
  }
FASTALEX_WGMMA(__half, "f16", "128", 16, FASTALEX_SLOTS_64, FASTALEX_SUMS_64, "64", "65")
FASTALEX_WGMMA(__half, "f16", "192", 24, FASTALEX_SLOTS_96, FASTALEX_SUMS_96, "96", "97")
FASTALEX_WGMMA(__nv_bfloat16, "bf16", "128", 16, FASTALEX_SLOTS_64, FASTALEX_SUMS_64, "64", "65")
FASTALEX_WGMMA(__nv_bfloat16, "bf16", "192", 24, FASTALEX_SLOTS_96, FASTALEX_SUMS_96, "96", "97")
#undef FASTALEX_SUM
#undef FASTALEX_SUMS
#undef FASTALEX_SUMS_64
#undef FASTALEX_SUMS_96
#undef FASTALEX_SLOTS_64
#undef FASTALEX_SLOTS_96
#undef FASTALEX_WGMMA
#undef FASTALEX_ON_SM90A

}  // namespace fastalex
#else
#include "host_ptx.h"
#endif
