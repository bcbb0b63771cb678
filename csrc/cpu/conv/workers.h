// Independent jobs on the host's threads, each worker with scratch of its own.
#pragma once
#include <algorithm>
#include <atomic>

#include "../parallel.h"

namespace fastalex::cpu::conv {

// Calls body(worker, job) for every job in [0, jobs), workers in [0, threads). Which worker takes a
// job is decided as they go, so results must not depend on it.
template <class Body>
void run_jobs(int64_t jobs, int threads, Body&& body) {
  const int workers = static_cast<int>(std::min<int64_t>(threads, jobs));
  if (workers <= 1) {
    for (int64_t job = 0; job < jobs; ++job) body(0, job);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t job = next++; job < jobs; job = next++) body(static_cast<int>(worker), job);
    }
  });
}

}  // namespace fastalex::cpu::conv
