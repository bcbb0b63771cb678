// Threads: one loop over independent work items, run by whoever hosts the library.
#pragma once
#include <cstdint>
#include <type_traits>

namespace fastalex::cpu {

// Calls body(begin, end, context) on disjoint ranges that cover [0, count), on the host's threads
// (torch's own pool in the extension, std::thread in stand-alone tests). No range is shorter than
// `grain` unless it is the last.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
void run_parallel(int64_t count, int64_t grain, RangeBody body, void* context);

int thread_count();

template <class Fn>
void parallel_for(int64_t count, int64_t grain, Fn&& fn) {
  using Body = std::remove_reference_t<Fn>;
  run_parallel(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace fastalex::cpu
