// Collects the accesses that -fsanitize=thread reports (linked without its runtime) and folds them
// warp by warp.
#include "trace.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <sstream>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fibers.h"

namespace host_cuda {

#ifdef HOST_CUDA_TRACE
namespace {

struct Access {
  const void* pc;
  uintptr_t address;
  unsigned bytes, lane;
  bool shared, write;
};
struct Site {
  bool write = false;
  long requests = 0, threads = 0, bytes = 0, units = 0, ideal = 0;
};
using SiteKey = std::pair<const void*, bool>;  // program counter, shared memory

std::vector<Access> accesses[kMaxThreads];
std::map<SiteKey, Site> sites;
std::unordered_set<uintptr_t> touched;  // 32-byte sectors of global memory that any thread touched
bool tracing = false;

bool inside(uintptr_t p, const void* begin, size_t bytes) {
  const auto b = reinterpret_cast<uintptr_t>(begin);
  return p >= b && p < b + bytes;
}

// Shared memory is served 8 lanes at a time for 16-byte words, 16 for 8, else 32; a wavefront takes
// one word a bank.
void fold_request(const SiteKey& key, const std::vector<Access>& request) {
  Site& site = sites[key];
  site.write = request[0].write;
  site.requests++;
  unsigned widest = 0;
  for (const Access& a : request) {
    widest = std::max(widest, a.bytes);
    site.threads += a.bytes != 0, site.bytes += a.bytes;
  }
  const unsigned unit = key.second ? 4 : 32;
  const unsigned phase = !key.second ? 32 : widest >= 16 ? 8 : widest == 8 ? 16 : 32;
  for (unsigned first = 0; first < 32; first += phase) {
    std::vector<uintptr_t> units;
    for (const Access& a : request)
      if (a.bytes && a.lane >= first && a.lane < first + phase)
        for (uintptr_t u = a.address / unit; u <= (a.address + a.bytes - 1) / unit; u++)
          units.push_back(u);
    if (units.empty()) continue;
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
    if (key.second) {
      long banks[32] = {};
      for (uintptr_t u : units) banks[u % 32]++;
      site.units += *std::max_element(banks, banks + 32);
      site.ideal += (units.size() + 31) / 32;
    } else {
      touched.insert(units.begin(), units.end());
      site.units += units.size();
      std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
      for (const Access& a : request)
        if (a.bytes) ranges.push_back({a.address, a.address + a.bytes});
      std::sort(ranges.begin(), ranges.end());
      uintptr_t bytes = 0, end = 0;
      for (auto [b, e] : ranges)
        bytes += e > std::max(b, end) ? e - std::max(b, end) : 0, end = std::max(end, e);
      site.ideal += (bytes + 31) / 32;
    }
  }
}

// The k-th time the lanes of a warp are at one program counter is one request.
void fold_block() {
  for (unsigned first = 0; first < state.threads; first += 32) {
    std::map<std::pair<SiteKey, int>, std::vector<Access>> requests;
    for (unsigned i = first; i < std::min(state.threads, first + 32); i++) {
      std::map<SiteKey, int> seen;
      for (const Access& a : accesses[i]) {
        const SiteKey key{a.pc, a.shared};
        requests[{key, seen[key]++}].push_back(a);
      }
      accesses[i].clear();
    }
    for (const auto& [key, request] : requests) fold_request(key.first, request);
  }
}

}  // namespace

void note(const void* address, unsigned bytes, bool write, const void* return_address) {
  if (!tracing || !state.in_kernel || is_fiber_stack(address)) return;
  const auto p = reinterpret_cast<uintptr_t>(address);
  if (inside(p, &state, sizeof state) || inside(p, state.host_stack, size_t{8} << 20)) return;
  const bool shared = inside(p, state.shared, state.shared_bytes);
  state.in_kernel = false;
  accesses[state.current->linear].push_back(
      {static_cast<const char*>(return_address) - 1, p, bytes, lane(), shared, write});
  state.in_kernel = true;
}

void trace_begin() {
  sites.clear(), touched.clear();
  block_end_hook = fold_block;
  tracing = true;
}

const char* trace_end() {
  static std::string text;
  tracing = false;
  block_end_hook = nullptr;
  Dl_info library;
  dladdr(reinterpret_cast<const void*>(&trace_end), &library);
  std::ostringstream out;
  out << "touched_sectors " << touched.size() << "\n";
  for (const auto& [key, s] : sites)
    out << static_cast<const char*>(key.first) - static_cast<const char*>(library.dli_fbase)
        << (key.second ? " shared " : " global ") << (s.write ? "store " : "load ") << s.requests
        << ' ' << s.threads << ' ' << s.bytes << ' ' << s.units << ' ' << s.ideal << "\n";
  text = out.str();
  return text.c_str();
}

#else
void trace_begin() {}
const char* trace_end() { return ""; }
#endif

}  // namespace host_cuda

#ifdef HOST_CUDA_TRACE
#define HOST_CUDA_HOOK(name, bytes, write)                               \
  extern "C" void name(void* address) {                                  \
    host_cuda::note(address, bytes, write, __builtin_return_address(0)); \
  }
HOST_CUDA_HOOK(__tsan_read1, 1, false)
HOST_CUDA_HOOK(__tsan_read2, 2, false)
HOST_CUDA_HOOK(__tsan_read4, 4, false)
HOST_CUDA_HOOK(__tsan_read8, 8, false)
HOST_CUDA_HOOK(__tsan_read16, 16, false)
HOST_CUDA_HOOK(__tsan_write1, 1, true)
HOST_CUDA_HOOK(__tsan_write2, 2, true)
HOST_CUDA_HOOK(__tsan_write4, 4, true)
HOST_CUDA_HOOK(__tsan_write8, 8, true)
HOST_CUDA_HOOK(__tsan_write16, 16, true)
HOST_CUDA_HOOK(__tsan_unaligned_read2, 2, false)
HOST_CUDA_HOOK(__tsan_unaligned_read4, 4, false)
HOST_CUDA_HOOK(__tsan_unaligned_read8, 8, false)
HOST_CUDA_HOOK(__tsan_unaligned_read16, 16, false)
HOST_CUDA_HOOK(__tsan_unaligned_write2, 2, true)
HOST_CUDA_HOOK(__tsan_unaligned_write4, 4, true)
HOST_CUDA_HOOK(__tsan_unaligned_write8, 8, true)
HOST_CUDA_HOOK(__tsan_unaligned_write16, 16, true)
extern "C" void __tsan_read_range(void* address, unsigned long bytes) {
  host_cuda::note(address, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, unsigned long bytes) {
  host_cuda::note(address, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}
#endif
