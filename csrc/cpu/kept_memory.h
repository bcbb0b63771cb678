// Large blocks of memory, kept when they are given back: for results and for the largest scratch.
//
// Above 32 MiB malloc maps every block anew, and a fresh page costs more than what an operator
// writes to it: 84 ms for the 151 MB of a fully connected layer's gradient on 4 KiB pages, 19 on
// huge ones, 6 when the memory was written before.
#pragma once
#include <cstddef>
#include <cstdint>

#include "buffer.h"

namespace fastalex::cpu {

// Blocks below this are malloc's business.
inline constexpr size_t kLargeBlock = size_t{32} << 20;

struct KeptBlock {
  Buffer buffer;
  uint64_t last_use = 0;
};

// A block of at least `bytes`: one given back before, where one fits, else a new one.
KeptBlock* take_block(size_t bytes);

// Any thread may; beyond the limit the least recently used blocks go back to the system.
void give_back_block(KeptBlock* block);

// Frees the blocks that wait for their next use.
void release_kept_memory();

// Bytes of all blocks, those in use included; and the most that may wait.
int64_t kept_memory_bytes();
int64_t kept_memory_limit();

// The calling thread's scratch for one call at a time: its own, kept for its next call, or a large
// block. Below that, calls from many threads share nothing and take no lock.
class ScratchLease {
 public:
  explicit ScratchLease(size_t bytes);
  ~ScratchLease();
  ScratchLease(const ScratchLease&) = delete;
  ScratchLease& operator=(const ScratchLease&) = delete;

  char* data() const;

 private:
  KeptBlock* block_ = nullptr;
};

}  // namespace fastalex::cpu
