// Packs: V neighbouring values of type T, moved as one word of up to 16 bytes and computed on in
// float32.
#pragma once

#include "ptx.cuh"

namespace fastalex {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

template <int Bytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};

template <class T, int V>
struct Pack {
  using Word = typename WordOf<sizeof(T) * V>::type;
  union {
    Word word;
    T value[V];
  };
  __device__ __forceinline__ Pack() {}
};

template <class T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}
template <class T>
__device__ __forceinline__ T from_float(float value) {
  return static_cast<T>(value);
}

// Values whose bytes lie side by side in global memory, aligned to the whole pack.
template <int V, class T>
__device__ __forceinline__ void load_values(const T* pointer, float (&out)[V]) {
  Pack<T, V> pack;
  pack.word = load_global(reinterpret_cast<const typename Pack<T, V>::Word*>(pointer));
#pragma unroll
  for (int i = 0; i < V; i++) out[i] = to_float(pack.value[i]);
}
template <int V, class T>
__device__ __forceinline__ void store_values(T* pointer, const float (&in)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; i++) pack.value[i] = from_float<T>(in[i]);
  store_global(reinterpret_cast<typename Pack<T, V>::Word*>(pointer), pack.word);
}

// The same in shared memory.
template <int V, class T>
__device__ __forceinline__ void load_shared_values(const T* pointer, float (&out)[V]) {
  Pack<T, V> pack;
  pack.word = load_shared(reinterpret_cast<const typename Pack<T, V>::Word*>(pointer));
#pragma unroll
  for (int i = 0; i < V; i++) out[i] = to_float(pack.value[i]);
}
template <int V, class T>
__device__ __forceinline__ void store_shared_values(T* pointer, const float (&in)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; i++) pack.value[i] = from_float<T>(in[i]);
  store_shared(reinterpret_cast<typename Pack<T, V>::Word*>(pointer), pack.word);
}

}  // namespace fastalex
