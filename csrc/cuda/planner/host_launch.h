// The planner's half of csrc/cuda/launch.h: says what to launch, and lets the caller do it.
#pragma once

namespace fastalex {

struct PlannedLaunch {
  const char* kernel;  // a C++ expression that names the kernel
  long long blocks;
  int threads, shared_bytes;
  long long plan_bytes;
  const void* plan;
};
void hand_over(const PlannedLaunch& planned, const LaunchShape& shape);

template <auto Kernel, class Plan>
void launch(const LaunchShape& shape, Stream, const Plan& plan) {
  static const std::string name = kernel_name<Kernel>();
  if (!shape.blocks) return;
  require_grid(name, shape);
  hand_over({name.c_str(), shape.blocks, shape.threads, shape.shared_bytes, sizeof(Plan), &plan},
            shape);
}

}  // namespace fastalex
