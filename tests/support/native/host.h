// Hosts the torch-free parts of the CPU library in a program of its own: one instruction set, and
// std::thread. Included by one source a program.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/library.h"
#include "../../../csrc/cpu/parallel.h"
#include "../../../csrc/cpu/poison.h"

namespace host {

inline int threads = 1;        // that an operator may use
inline bool in_turn = false;   // ranges run one after another, for a fuzzer's repeatability
inline bool poisoned = false;  // fresh working memory holds NaN

}  // namespace host

namespace fastalex::cpu {

const Kernels& kernels() { return FASTALEX_ISA::kernels; }
bool poison_enabled() { return host::poisoned; }
int thread_count() { return host::threads; }

void run_parallel(int64_t count, int64_t grain, RangeBody body, void* context) {
  const int64_t most = (count + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t ranges = std::min<int64_t>(host::threads, most);
  const auto range = [=](int64_t i) {
    if (count > 0) body(count * i / ranges, count * (i + 1) / ranges, context);
  };
  if (ranges <= 1 || host::in_turn) {
    for (int64_t i = 0; i < ranges; ++i) range(i);
    return;
  }
  std::vector<std::thread> workers;
  for (int64_t i = 1; i < ranges; ++i) workers.emplace_back(range, i);
  range(0);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace fastalex::cpu
