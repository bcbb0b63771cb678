// Weights in the layout a kernel wants, kept while the weight they were made from is unchanged. No
// torch here.
#pragma once
#include <array>
#include <cstdint>
#include <memory>

#include "buffer.h"

namespace fastalex::cpu {

// A weight whose elements are dense in memory, in whatever order.
struct WeightBytes {
  const void* data;
  int64_t bytes;
};

// The packed form of `weight`, made by `pack(context, out)` unless one is kept whose weight had the
// very same content. Content decides, not torch's version counter, which writes through `.data`, by
// fused optimisers and by other processes leave unmoved. `layout` tells apart everything else that
// decides the packed bytes. The result stays valid while it is held, whatever other threads do.
std::shared_ptr<const Buffer> packed_weight(WeightBytes weight, uint64_t layout, size_t bytes,
                                            void (*pack)(void* context, void* out), void* context);

template <class Pack>
std::shared_ptr<const Buffer> packed_weight(WeightBytes weight, uint64_t layout, size_t bytes,
                                            Pack&& pack) {
  return packed_weight(
      weight, layout, bytes, [](void* context, void* out) { (*static_cast<Pack*>(context))(out); },
      &pack);
}

// Frees what was packed from the weight whose data begins at `address`.
void release_packed(int64_t address);

void release_all_packed();

// Bytes kept now, and the most that are.
int64_t packed_bytes();
int64_t packed_limit();

}  // namespace fastalex::cpu
