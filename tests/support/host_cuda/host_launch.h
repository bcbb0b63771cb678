// The host runtime's half of csrc/cuda/launch.h: runs the grid on fibers and keeps a record of
// every launch.
#pragma once

#include <vector>

#include "host_cuda.h"

namespace fastalex {

struct LaunchRecord {
  std::string kernel;
  LaunchShape shape;
  std::vector<unsigned char> plan;
};
inline std::vector<LaunchRecord> launch_records;
inline bool launches_are_dry = false;  // record only

template <auto Kernel, class Plan>
void launch(const LaunchShape& shape, Stream, const Plan& plan) {
  if (!shape.blocks) return;
  require_grid(kernel_name<Kernel>(), shape);
  auto bytes = reinterpret_cast<const unsigned char*>(&plan);
  launch_records.push_back({kernel_name<Kernel>(), shape, {bytes, bytes + sizeof(Plan)}});
  if (launches_are_dry) return;
  try {
    host_cuda::run(dim3(static_cast<unsigned>(shape.blocks)), dim3(shape.threads),
                   shape.shared_bytes, [&plan] { Kernel(plan); });
  } catch (const std::runtime_error& error) {
    throw_launch_error(kernel_name<Kernel>(), shape, error.what());
  }
}

}  // namespace fastalex
