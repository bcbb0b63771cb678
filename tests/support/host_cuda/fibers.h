// Runs CUDA blocks on the CPU: one fiber per CUDA thread, blocks one after another, every schedule
// reproducible.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace host_cuda {

inline constexpr unsigned kMaxThreads = 1024;
inline constexpr size_t kStackBytes = size_t{1} << 16;
inline constexpr size_t kMaxSharedBytes = 227 * 1024;

enum class Status : char { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack;
  void* tsan_fiber;
  void* asan_fake_stack;
  uint3 thread;
  unsigned linear;
  Status status;
  unsigned warp_mask;
  const void* input;  // what this lane brings to a warp-wide exchange
  void* output;       // where its result goes
};

// The lanes of one warp that meet at one intrinsic; absent lanes are null.
struct WarpMeeting {
  Fiber* lane[32];
  unsigned mask;
};
using Exchange = void (*)(WarpMeeting&);

// How ready threads take turns: all orders are legal on a GPU, so a kernel must give one answer
// under all of them.
struct Schedule {
  enum Kind : int {
    kForward,
    kBackward,
    kRandom,
    kGreedyWarps,
    kGreedyWarpsBackward
  } kind = kForward;
  unsigned seed = 1;
};

// What the builtin variables and the tracer look at; kept together so that the tracer can leave it
// out.
struct State {
  Fiber* current;
  uint3 block;
  dim3 block_dim, grid_dim;
  unsigned threads;
  char* shared;
  size_t shared_bytes;
  bool in_kernel;
  const char* host_stack;
};
extern State state;
extern Schedule schedule;
extern void (*thread_exit_hook)();
extern void (*block_end_hook)();
extern void (*abandon_hook)();

[[noreturn]] void fail(
    const std::string& what);  // stops the launch: run() throws std::runtime_error

void sync_block();
// Blocks until every lane of `mask` is here; the last one performs `exchange` (if any) for all.
void sync_warp(unsigned mask, Exchange exchange);
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
bool is_fiber_stack(const void* address);

inline unsigned lane() { return state.current->linear % 32; }

}  // namespace host_cuda
