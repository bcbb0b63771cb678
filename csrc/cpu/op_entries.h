// The kernel functions of one instruction set, and what they share.
#pragma once
#include <algorithm>
#include <type_traits>

#include "isa.h"
#include "kernels.h"

namespace fastalex::cpu::FASTALEX_ISA {

void lrn(const LrnCall& call);
void lrn_backward(const LrnBackwardCall& call);
void max_pool(const MaxPoolCall& call);
void max_pool_backward(const MaxPoolBackwardCall& call);
void lrn_max_pool(const LrnMaxPoolCall& call);
void lrn_max_pool_backward(const LrnMaxPoolBackwardCall& call);
void fingerprint(const void* data, int64_t bytes, uint64_t* result);
void augment(const AugmentCall& call);

// Items of `elements` each that make a range worth a thread.
inline int64_t grain(int64_t elements) {
  return std::max<int64_t>(1, 8192 / std::max<int64_t>(1, elements));
}

// Where row h of image n begins, in a channels_last map.
template <class T>
T* row_at(const Map& map, int64_t n, int64_t h) {
  return static_cast<T*>(map.data) + n * map.batch_stride + h * map.row_stride;
}

// Where plane c of image n begins, in an NCHW map.
template <class T>
T* plane_at(const Map& map, int64_t n, int64_t c) {
  return static_cast<T*>(map.data) + n * map.batch_stride + c * map.channel_stride;
}

// Calls fn(tag, track): the offsets' element type, and whether they are wanted at all.
template <class Fn>
void visit_offsets(const PoolParams& pool, bool track, Fn&& fn) {
  if (!track) return fn(uint8_t{}, std::false_type{});
  if (pool.taps() <= 256) return fn(uint8_t{}, std::true_type{});
  return fn(int32_t{}, std::true_type{});
}

}  // namespace fastalex::cpu::FASTALEX_ISA
