// Large blocks of memory, kept when they are given back: for results and for the largest scratch.
#include "kept_memory.h"

#include <pthread.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

namespace fastalex::cpu {
namespace {

constexpr size_t kLimit = size_t{1} << 30;  // of idle memory
// A thread keeps no more scratch than this between calls.
constexpr size_t kThreadScratch = size_t{64} << 20;

thread_local Buffer t_scratch;

struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<KeptBlock>> idle;
  size_t idle_bytes = 0, all_bytes = 0;
  uint64_t clock = 0;
};

// Never destroyed: tensors may outlive static objects.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// A child forked while another thread held the lock would wait for ever.
[[maybe_unused]] const int g_fork_handlers = pthread_atfork(
    [] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });

std::unique_ptr<KeptBlock> remove_idle(Pool& p, size_t index) {
  std::unique_ptr<KeptBlock> block = std::move(p.idle[index]);
  p.idle.erase(p.idle.begin() + static_cast<ptrdiff_t>(index));
  p.idle_bytes -= block->buffer.capacity();
  return block;
}

// The smallest idle block that serves without wasting a fifth of itself; null if none does.
std::unique_ptr<KeptBlock> find_idle(Pool& p, size_t bytes) {
  size_t best = p.idle.size();
  for (size_t i = 0; i < p.idle.size(); ++i) {
    const size_t capacity = p.idle[i]->buffer.usable();
    if (capacity < bytes || capacity > bytes + bytes / 4) continue;
    if (best == p.idle.size() || capacity < p.idle[best]->buffer.usable()) best = i;
  }
  return best == p.idle.size() ? nullptr : remove_idle(p, best);
}

}  // namespace

KeptBlock* take_block(size_t bytes) {
  Pool& p = pool();
  std::unique_ptr<KeptBlock> block;
  {
    const std::lock_guard lock(p.mutex);
    block = find_idle(p, bytes);
  }
  if (block) {
    block->buffer.reserve(bytes);
    return block.release();
  }
  block = std::make_unique<KeptBlock>();
  try {
    block->buffer.reserve(bytes);
  } catch (const std::exception&) {
    release_kept_memory();  // what waits may be what is missing
    block->buffer.reserve(bytes);
  }
  const std::lock_guard lock(p.mutex);
  p.all_bytes += block->buffer.capacity();
  return block.release();
}

void give_back_block(KeptBlock* given) {
  std::unique_ptr<KeptBlock> block(given);
  block->buffer.check();
  std::vector<std::unique_ptr<KeptBlock>> freed;  // after the lock is
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  if (block->buffer.capacity() > kLimit) {
    p.all_bytes -= block->buffer.capacity();
    freed.push_back(std::move(block));
    return;
  }
  block->last_use = ++p.clock;
  p.idle_bytes += block->buffer.capacity();
  p.idle.push_back(std::move(block));
  while (p.idle_bytes > kLimit) {
    const auto oldest =
        std::min_element(p.idle.begin(), p.idle.end(),
                         [](const auto& a, const auto& b) { return a->last_use < b->last_use; });
    freed.push_back(remove_idle(p, static_cast<size_t>(oldest - p.idle.begin())));
    p.all_bytes -= freed.back()->buffer.capacity();
  }
}

void release_kept_memory() {
  std::vector<std::unique_ptr<KeptBlock>> freed;
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  freed.swap(p.idle);
  p.all_bytes -= p.idle_bytes;
  p.idle_bytes = 0;
}

int64_t kept_memory_bytes() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  return static_cast<int64_t>(p.all_bytes);
}

int64_t kept_memory_limit() { return static_cast<int64_t>(kLimit); }

ScratchLease::ScratchLease(size_t bytes) {
  if (bytes > kThreadScratch) {
    block_ = take_block(bytes);
  } else {
    t_scratch.reserve(bytes);
  }
}

ScratchLease::~ScratchLease() {
  if (block_ != nullptr) {
    give_back_block(block_);
  } else {
    t_scratch.check();
  }
}

char* ScratchLease::data() const {
  return block_ != nullptr ? block_->buffer.data() : t_scratch.data();
}

}  // namespace fastalex::cpu
