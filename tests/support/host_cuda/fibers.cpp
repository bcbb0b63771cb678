// The fiber scheduler behind fibers.h: context switches, barriers, schedules, canaries and
// sanitizer bookkeeping.
#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// Saves the callee-saved registers and the stack pointer, then continues on the other stack.
extern "C" void host_cuda_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl host_cuda_switch
.hidden host_cuda_switch
host_cuda_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

namespace host_cuda {

State state;
Schedule schedule;
void (*thread_exit_hook)() = nullptr;
void (*block_end_hook)() = nullptr;
void (*abandon_hook)() = nullptr;

namespace {

constexpr size_t kCanaryBytes = 128;
constexpr unsigned char kCanary = 0xA5;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating type

struct Scheduler {
  Fiber fibers[kMaxThreads];
  Exchange exchange[kMaxThreads];
  unsigned waiting[32];  // lanes of each warp at a warp barrier
  void* main_stack_pointer;
  void* main_fake_stack;
  void* main_tsan_fiber;
  const void* main_stack_bottom;
  size_t main_stack_bytes;
  const std::function<void()>* kernel;
  std::string failure;
  char begin_edge, end_edge, block_edge, warp_edge[32];  // addresses that order threads for TSan
};
Scheduler scheduler;
char* stacks = nullptr;

void publish([[maybe_unused]] void* edge) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(edge);
#endif
}
void observe([[maybe_unused]] void* edge) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(edge);
#endif
}

#define HOST_CUDA_RUNTIME __attribute__((noinline, no_sanitize("address", "thread", "undefined")))

HOST_CUDA_RUNTIME void yield_to_scheduler() {
  Fiber* me = state.current;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(scheduler.main_tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(me->status == Status::kDone ? nullptr : &me->asan_fake_stack,
                                 scheduler.main_stack_bottom, scheduler.main_stack_bytes);
#endif
  host_cuda_switch(&me->stack_pointer, scheduler.main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->asan_fake_stack, &scheduler.main_stack_bottom,
                                  &scheduler.main_stack_bytes);
#endif
}

HOST_CUDA_RUNTIME void resume(Fiber* fiber) {
  state.current = fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.main_fake_stack, fiber->stack, kStackBytes);
#endif
  host_cuda_switch(&scheduler.main_stack_pointer, fiber->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.main_fake_stack, nullptr, nullptr);
#endif
}

HOST_CUDA_RUNTIME void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.main_stack_bottom,
                                  &scheduler.main_stack_bytes);
#endif
  observe(&scheduler.begin_edge);
  (*scheduler.kernel)();
  if (thread_exit_hook) thread_exit_hook();
  publish(&scheduler.end_edge);
  state.current->status = Status::kDone;
  yield_to_scheduler();
  __builtin_trap();
}

HOST_CUDA_RUNTIME void prepare(Fiber& fiber, unsigned linear) {
  fiber.stack = stacks + linear * kStackBytes;
  auto top =
      reinterpret_cast<void**>(fiber.stack + kStackBytes) - 1;  // keeps calls 16-byte aligned
  *--top = reinterpret_cast<void*>(fiber_main);
  top -= 6;  // the six registers that host_cuda_switch restores
  std::memset(top, 0, 6 * sizeof(void*));
  fiber.stack_pointer = top;
  fiber.linear = linear;
  const dim3& d = state.block_dim;
  fiber.thread = {linear % d.x, linear / d.x % d.y, linear / (d.x * d.y)};
  fiber.status = Status::kReady;
  fiber.asan_fake_stack = nullptr;
#if defined(__SANITIZE_THREAD__)
  if (!fiber.tsan_fiber) fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

// Runs one thread until it waits; false when it could not run.
bool step(unsigned i, unsigned& done) {
  Fiber& fiber = scheduler.fibers[i];
  if (fiber.status != Status::kReady) return false;
  resume(&fiber);
  if (!scheduler.failure.empty()) throw std::runtime_error(scheduler.failure);
  done += fiber.status == Status::kDone;
  return true;
}

// One warp runs until all of it waits for the block: the widest skew there can be between warps.
bool greedy_round(bool backward, unsigned& done) {
  const unsigned warps = (state.threads + 31) / 32;
  bool progress = false;
  for (unsigned k = 0; k < warps; k++) {
    const unsigned warp = backward ? warps - 1 - k : k;
    const unsigned end = std::min(state.threads, (warp + 1) * 32);
    for (bool again = true; again;) {
      again = false;
      for (unsigned i = warp * 32; i < end; i++) again |= step(i, done);
      progress |= again;
    }
  }
  return progress;
}

unsigned turn(unsigned k, unsigned random) {
  const unsigned n = state.threads;
  if (schedule.kind == Schedule::kBackward) return n - 1 - k;
  if (schedule.kind == Schedule::kRandom) {  // an odd stride visits all of a power of two
    const bool power_of_two = (n & (n - 1)) == 0;
    return (power_of_two ? k * 2654435761u + random : k + random % n) % n;
  }
  return k;
}

bool round_of_all(unsigned& random, unsigned& done) {
  random = random * 1664525u + 1013904223u;
  bool progress = false;
  for (unsigned k = 0; k < state.threads; k++) progress |= step(turn(k, random), done);
  return progress;
}

void run_block() {
  for (unsigned i = 0; i < state.threads; i++) prepare(scheduler.fibers[i], i);
  std::fill(std::begin(scheduler.waiting), std::end(scheduler.waiting), 0u);
  unsigned done = 0, random = schedule.seed;
  while (done < state.threads) {
    const bool greedy = schedule.kind >= Schedule::kGreedyWarps;
    const bool progress = greedy
                              ? greedy_round(schedule.kind == Schedule::kGreedyWarpsBackward, done)
                              : round_of_all(random, done);
    if (progress) continue;
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < state.threads; i++)
      at_barrier += scheduler.fibers[i].status == Status::kAtBlockBarrier;
    if (!at_barrier || at_barrier + done != state.threads)
      throw std::runtime_error("deadlock: threads wait at different barriers");
    for (unsigned i = 0; i < state.threads; i++)
      if (scheduler.fibers[i].status == Status::kAtBlockBarrier)
        scheduler.fibers[i].status = Status::kReady;
  }
}

// Dynamic shared memory of one block: poisoned, with canaries on both sides.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes)
      : bytes_(bytes), size_((bytes + 2 * kCanaryBytes + 127) / 128 * 128) {
    memory_.reset(
        static_cast<unsigned char*>(std::aligned_alloc(1024, (size_ + 1023) / 1024 * 1024)));
    std::memset(memory_.get(), kCanary, size_);
    std::memset(data(), kPoison, bytes_);
  }
  char* data() { return reinterpret_cast<char*>(memory_.get()) + kCanaryBytes; }
  void check() const {
    const auto intact = [](unsigned char byte) { return byte == kCanary; };
    const unsigned char* begin = memory_.get();
    if (!std::all_of(begin, begin + kCanaryBytes, intact) ||
        !std::all_of(begin + kCanaryBytes + bytes_, begin + size_, intact))
      throw std::runtime_error("a write fell outside dynamic shared memory");
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  size_t bytes_, size_;
  std::unique_ptr<unsigned char, Free> memory_;
};

std::string place() {
  const uint3 b = state.block, t = state.current->thread;
  const auto triple = [](uint3 v) {
    return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z);
  };
  return " (block " + triple(b) + " thread " + triple(t) + ")";
}

}  // namespace

bool is_fiber_stack(const void* address) {
  auto p = static_cast<const char*>(address);
  return p >= stacks && p < stacks + kMaxThreads * kStackBytes;
}

HOST_CUDA_RUNTIME void fail(const std::string& what) {
  scheduler.failure = what + place();
  yield_to_scheduler();
  __builtin_trap();  // a failed launch is abandoned, its fibers never resume
}

HOST_CUDA_RUNTIME void sync_block() {
  publish(&scheduler.block_edge);
  state.current->status = Status::kAtBlockBarrier;
  yield_to_scheduler();
  observe(&scheduler.block_edge);
}

HOST_CUDA_RUNTIME void sync_warp(unsigned mask, Exchange exchange) {
  Fiber* me = state.current;
  const unsigned warp = me->linear / 32, first = warp * 32;
  const unsigned present = std::min(32u, state.threads - first);
  const unsigned needed = present == 32 ? mask : mask & ((1u << present) - 1);
  if (!(mask >> (me->linear % 32) & 1)) fail("warp intrinsic: the calling lane is not in its mask");
  if (needed != mask && mask != ~0u)
    fail("warp intrinsic: the mask names a lane past the block's end");
  me->warp_mask = mask;
  scheduler.exchange[me->linear] = exchange;
  me->status = Status::kAtWarpBarrier;
  publish(&scheduler.warp_edge[warp]);
  scheduler.waiting[warp]++;

  WarpMeeting meeting{{}, mask};
  bool all_here = true;
  for (unsigned i = 0; i < present; i++) {
    if (!(needed >> i & 1)) continue;
    Fiber* other = meeting.lane[i] = &scheduler.fibers[first + i];
    if (other->status == Status::kDone) fail("warp intrinsic: the mask names an exited lane");
    if (other->status != Status::kAtWarpBarrier || other->warp_mask != mask)
      all_here = false;
    else if (scheduler.exchange[other->linear] != exchange)
      fail("warp intrinsic: lanes of one mask are at different intrinsics");
  }
  if (all_here) {
    observe(&scheduler.warp_edge[warp]);  // what the others brought
    if (exchange) exchange(meeting);
    publish(&scheduler.warp_edge[warp]);  // what they get
    for (Fiber* other : meeting.lane)
      if (other) other->status = Status::kReady, scheduler.waiting[warp]--;
  } else {
    yield_to_scheduler();
  }
  observe(&scheduler.warp_edge[warp]);
}

HOST_CUDA_RUNTIME void run(dim3 grid, dim3 block, size_t shared_bytes,
                           const std::function<void()>& kernel) {
  const char here = 0;
  if (!stacks) {
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  state = {};
  state.host_stack = &here;
  state.grid_dim = grid, state.block_dim = block;
  state.threads = block.x * block.y * block.z;
  if (!state.threads || state.threads > kMaxThreads)
    throw std::runtime_error("a block has " + std::to_string(state.threads) +
                             " threads: 1 to 1024 allowed");
  if (shared_bytes > kMaxSharedBytes)
    throw std::runtime_error(std::to_string(shared_bytes) +
                             " bytes of dynamic shared memory: at most 227 KiB");
  scheduler.kernel = &kernel;
  scheduler.failure.clear();
#if defined(__SANITIZE_THREAD__)
  scheduler.main_tsan_fiber = __tsan_get_current_fiber();
#endif
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        SharedMemory shared(shared_bytes);
        state.block = {x, y, z};
        state.shared = shared.data(), state.shared_bytes = shared_bytes;
        publish(&scheduler.begin_edge);
        state.in_kernel = true;
        try {
          run_block();
        } catch (...) {
          state.in_kernel = false;
          if (abandon_hook) abandon_hook();
          throw;
        }
        state.in_kernel = false;
        if (block_end_hook) block_end_hook();
        observe(&scheduler.end_edge);
        shared.check();
      }
}

}  // namespace host_cuda
