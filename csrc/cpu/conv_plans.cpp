// Plans of convolutions, kept so that a call does not make its own. No torch here.
#include "conv_plans.h"

#include <pthread.h>

#include <array>
#include <map>
#include <mutex>
#include <utility>

#include "library.h"
#include "parallel.h"

namespace fastalex::cpu {
namespace {

// Plans by everything that decides them. They are small and quick to make; a program that meets
// more shapes than this starts again.
constexpr size_t kMaxPlans = 1024;
using PlanKey = std::array<int64_t, 24>;
std::mutex g_mutex;
std::map<PlanKey, std::shared_ptr<const conv::Plan>> g_plans;
// A child forked while another thread held the lock would wait for ever.
[[maybe_unused]] const int g_fork_handlers =
    pthread_atfork([] { g_mutex.lock(); }, [] { g_mutex.unlock(); }, [] { g_mutex.unlock(); });

}  // namespace

std::shared_ptr<const conv::Plan> plan_for(const conv::Problem& p, conv::Pass pass,
                                           conv::Engine engine, int tile) {
  const conv::ConvKernels& table = kernels().conv();
  const int threads = thread_count();
  const PlanKey key{reinterpret_cast<intptr_t>(&table),
                    static_cast<int64_t>(pass),
                    threads,
                    static_cast<int64_t>(engine),
                    tile,
                    static_cast<int64_t>(p.dtype),
                    static_cast<int64_t>(p.precision),
                    p.batch,
                    p.groups,
                    p.in_channels,
                    p.in_height,
                    p.in_width,
                    p.out_channels,
                    p.kernel_height,
                    p.kernel_width,
                    p.stride_height,
                    p.stride_width,
                    p.padding_height,
                    p.padding_width,
                    p.dilation_height,
                    p.dilation_width,
                    p.relu,
                    p.by_image,
                    p.pairs};
  {
    const std::lock_guard lock(g_mutex);
    const auto found = g_plans.find(key);
    if (found != g_plans.end()) return found->second;
  }
  auto plan = std::make_shared<const conv::Plan>(table, p, pass, threads, engine, tile);
  const std::lock_guard lock(g_mutex);
  if (g_plans.size() >= kMaxPlans) g_plans.clear();
  return g_plans.emplace(key, std::move(plan)).first->second;
}

}  // namespace fastalex::cpu
