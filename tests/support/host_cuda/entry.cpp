// What tests ask of the host runtime beside the operators, through ctypes: schedules, traces,
// launches.
#include "launch.h"
#include "trace.h"

using namespace fastalex;

#define HOST_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

HOST_CUDA_EXPORT void host_cuda_schedule(int kind, unsigned seed) {
  host_cuda::schedule = {static_cast<host_cuda::Schedule::Kind>(kind), seed};
}
HOST_CUDA_EXPORT void host_cuda_trace_begin() { host_cuda::trace_begin(); }
HOST_CUDA_EXPORT const char* host_cuda_trace_end() { return host_cuda::trace_end(); }

// The launches since the last call, a line each: kernel, blocks, threads, shared bytes, plan in
// hexadecimal.
HOST_CUDA_EXPORT const char* host_cuda_launches() {
  static std::string text;
  text.clear();
  for (const LaunchRecord& r : launch_records) {
    text += r.kernel + "\t" + std::to_string(r.shape.blocks) + "\t" +
            std::to_string(r.shape.threads) + "\t" + std::to_string(r.shape.shared_bytes) + "\t";
    for (unsigned char byte : r.plan)
      text += "0123456789abcdef"[byte >> 4], text += "0123456789abcdef"[byte & 15];
    text += "\n";
  }
  launch_records.clear();
  return text.c_str();
}
HOST_CUDA_EXPORT void host_cuda_dry_run(bool on) { launches_are_dry = on; }
