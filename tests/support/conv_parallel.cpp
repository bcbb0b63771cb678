// Threads for the stand-alone convolution library: a pool that spins briefly, then sleeps.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/cpu/parallel.h"

namespace fastalex::cpu {
namespace {

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) {
      workers_.emplace_back([this, i] { work(i); });
      workers_.back().detach();
    }
  }
  int threads() const { return threads_; }

  void run(int64_t count, int64_t grain, RangeBody body, void* context) {
    const int64_t ranges =
        std::min<int64_t>(threads_, (count + grain - 1) / std::max<int64_t>(1, grain));
    if (ranges <= 1) {
      if (count > 0) body(0, count, context);
      return;
    }
    count_ = count, ranges_ = ranges, body_ = body, context_ = context;
    pending_.store(threads_ - 1);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    share(0);
    while (pending_.load(std::memory_order_acquire) != 0) _mm_pause();
  }

 private:
  void share(int index) {
    if (index >= ranges_) return;
    body_(count_ * index / ranges_, count_ * (index + 1) / ranges_, context_);
  }
  void work(int index) {
    int seen = 0;
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen;) {
        if (++spins < 2000) {
          _mm_pause();
        } else {
          generation_.wait(seen);
        }
      }
      ++seen;
      share(index);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  int threads_;
  std::vector<std::thread> workers_;
  std::atomic<int> generation_{0}, pending_{0};
  int64_t count_ = 0, ranges_ = 0;
  RangeBody body_ = nullptr;
  void* context_ = nullptr;
};

std::mutex mutex;
Pool* current = nullptr;  // pools are never destroyed: their threads are detached

Pool& pool() {
  const std::lock_guard lock(mutex);
  if (!current) current = new Pool(2);
  return *current;
}

}  // namespace

void run_parallel(int64_t count, int64_t grain, RangeBody body, void* context) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  pool().run(count, grain, body, context);
}

int thread_count() { return pool().threads(); }

}  // namespace fastalex::cpu

extern "C" void conv_set_threads(int threads) {
  const std::lock_guard lock(fastalex::cpu::mutex);
  if (!fastalex::cpu::current || fastalex::cpu::current->threads() != threads) {
    fastalex::cpu::current = new fastalex::cpu::Pool(threads);
  }
}
