// The library's state: which instruction set runs, whether memory is poisoned, and torch's threads.
#include "library.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "parallel.h"
#include "poison.h"
#include "require.h"

namespace fastalex::cpu {
namespace {

std::atomic<bool> g_poison{false};

// Best first. A null table: not in this build.
struct IsaChoice {
  const char* name;
  bool (*runs_here)();
  const Kernels* kernels;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif
bool always() { return true; }

const IsaChoice kIsas[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, &avx512::kernels},
    {"avx2", has_avx2, &avx2::kernels},
#endif
    {"portable", always, &portable::kernels},
};

const Kernels* best_kernels() {
  for (const IsaChoice& isa : kIsas) {
    if (isa.runs_here()) return isa.kernels;
  }
  return &portable::kernels;
}

std::atomic<const Kernels*> g_kernels{best_kernels()};

}  // namespace

const Kernels& kernels() { return *g_kernels.load(std::memory_order_relaxed); }

std::string isa() { return kernels().isa; }

// Comma-separated, best first.
std::string available_isas() {
  std::string names;
  for (const IsaChoice& isa : kIsas) {
    if (!isa.runs_here()) continue;
    if (!names.empty()) names += ",";
    names += isa.name;
  }
  return names;
}

void set_isa(std::string name) {
  for (const IsaChoice& isa : kIsas) {
    if (name != isa.name) continue;
    require(isa.runs_here(), "this CPU cannot run ", name, "; it runs ", available_isas());
    g_kernels.store(isa.kernels, std::memory_order_relaxed);
    return;
  }
  fail("unknown instruction set '", name, "'; one of ", available_isas());
}

void set_poison(bool enabled) { g_poison.store(enabled, std::memory_order_relaxed); }

bool poison_enabled() { return g_poison.load(std::memory_order_relaxed); }

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

void run_parallel(int64_t count, int64_t grain, RangeBody body, void* context) {
  if (count <= grain) {
    if (count > 0) body(0, count, context);
    return;
  }
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

}  // namespace fastalex::cpu
