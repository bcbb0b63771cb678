// The planner's half of csrc/cuda/launch.h: writes down what would be launched.
#pragma once

#include <cstring>
#include <vector>

namespace fastalex {

struct PlannedLaunch {
  const char* kernel;  // a C++ expression that names the kernel
  long long blocks;
  int threads, shared_bytes;
  long long plan_bytes;
  alignas(8) unsigned char plan[1024];
};
inline std::vector<PlannedLaunch> planned;

template <auto Kernel, class Plan>
void launch(const LaunchShape& shape, Stream, const Plan& plan) {
  static_assert(sizeof(Plan) <= sizeof(PlannedLaunch::plan));
  static const std::string name = kernel_name<Kernel>();
  if (!shape.blocks) return;
  if (shape.blocks > 0x7fffffffll)
    throw_launch_error(name, shape, "a grid has at most 2^31 - 1 blocks");
  PlannedLaunch record = {name.c_str(),       shape.blocks, shape.threads,
                          shape.shared_bytes, sizeof(Plan), {}};
  std::memcpy(record.plan, &plan, sizeof(Plan));
  planned.push_back(record);
}

}  // namespace fastalex
