// The g++ twins of wgmma and what goes with it: descriptors are decoded, and a product that is
// still running shows, in its sums and in its operands.
#pragma once

#include <algorithm>
#include <vector>

#include "host_ptx.h"

namespace fastalex {

inline constexpr bool kHasWgmma = true;
inline void stop_with_error() { host_cuda::fail("a kernel that this GPU has no code for"); }
inline unsigned wgmma_address(SharedAddress tile) {
  return static_cast<unsigned>(tile - host_cuda::state.shared);
}

namespace twin {

// What one instruction read: 16 bytes of an operand, which must not change before it ends.
struct OperandPiece {
  size_t offset;
  uint32_t words[4];
};
// The products that a warp has in flight, on one set of sums.
struct WgmmaQueue {
  float* sums_of[32];
  std::vector<float> sums;  // [lane][column / 8][4]; empty while nothing runs
  std::vector<OperandPiece> reads;
  std::vector<size_t> groups;  // reads made up to each commit
  bool fenced = false;
};
inline WgmmaQueue wgmma_queues[host_cuda::kMaxThreads / 32];

struct WgmmaInput {
  float* sums;
  int columns;  // eights of them
  unsigned long long a, b;
  int pending;  // of a wait
};
inline const WgmmaInput& wgmma_input(const host_cuda::WarpMeeting& meeting, int lane) {
  return *static_cast<const WgmmaInput*>(meeting.lane[lane]->input);
}
inline WgmmaQueue& wgmma_queue(const host_cuda::Fiber* fiber) {
  return wgmma_queues[fiber->linear / 32];
}

// PTX ISA, matrix descriptor, K-major: rows of 64 bytes in groups of eight, `stride` apart; the
// swizzle adds address bits 7 and 8 to bits 4 and 5.
inline size_t operand_offset(unsigned long long descriptor, int row, int chunk) {
  const size_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 2) host_cuda::fail("a wgmma operand is not in the 64-byte swizzle");
  if (descriptor >> 49 & 7 || start % 512 >= 64)
    host_cuda::fail("a wgmma operand starts inside a swizzle pattern");
  const size_t plain = start + row / 8 * stride + row % 8 * 64 + chunk * 16;
  return plain ^ (plain >> 3 & 0x30);
}

// Row `row` of an operand, 16 values, read as wgmma does: through the asynchronous proxy.
template <class T>
void read_operand(WgmmaQueue& queue, unsigned long long descriptor, int row, float* values) {
  for (int chunk = 0; chunk < 2; chunk++) {
    OperandPiece piece = {operand_offset(descriptor, row, chunk), {}};
    const char* place = host_cuda::state.shared + piece.offset;
    if (!in_shared(place, 16)) host_cuda::fail("a wgmma operand is out of range");
    if (!is_handed_over(piece.offset))
      host_cuda::fail("wgmma reads what no fence.proxy.async handed over");
    std::memcpy(piece.words, place, 16);
    for (int i = 0; i < 8; i++)
      values[8 * chunk + i] = widen(T(), uint16_t(piece.words[i / 2] >> i % 2 * 16));
    queue.reads.push_back(piece);
  }
}

// Each warp multiplies its 16 of the warpgroup's 64 rows.
template <class T>
void exchange_wgmma(host_cuda::WarpMeeting& meeting) {
  Untraced untraced;
  const WgmmaInput& all = wgmma_input(meeting, 0);
  WgmmaQueue& queue = wgmma_queue(meeting.lane[0]);
  if (!queue.fenced) host_cuda::fail("wgmma without wgmma.fence before its group");
  const size_t count = 4 * all.columns;
  const bool idle = queue.sums.empty();
  for (int lane = 0; lane < 32; lane++) {
    const WgmmaInput& mine = wgmma_input(meeting, lane);
    if (mine.a != all.a || mine.b != all.b)
      host_cuda::fail("wgmma descriptors differ between the lanes of a warp");
    if (!idle && queue.sums_of[lane] != mine.sums)
      host_cuda::fail("the twin of wgmma follows one set of sums");
    queue.sums_of[lane] = mine.sums;
    if (idle) queue.sums.insert(queue.sums.end(), mine.sums, mine.sums + count);
    std::memset(mine.sums, 0xff, count * sizeof(float));  // NaN until it is waited for
  }
  std::vector<float> a(16 * 16), b(8 * all.columns * 16);
  const int first = meeting.lane[0]->linear / 32 % 4 * 16;
  for (int row = 0; row < 16; row++) read_operand<T>(queue, all.a, first + row, &a[row * 16]);
  for (int row = 0; row < 8 * all.columns; row++) read_operand<T>(queue, all.b, row, &b[row * 16]);
  for (int lane = 0; lane < 32; lane++)
    for (size_t e = 0; e < count; e++) {
      const float *left = &a[(lane / 4 + e / 2 % 2 * 8) * 16],
                  *right = &b[(e / 4 * 8 + lane % 4 * 2 + e % 2) * 16];
      float& sum = queue.sums[lane * count + e];
      for (int k = 0; k < 16; k++) sum += left[k] * right[k];
    }
}

inline void exchange_wgmma_commit(host_cuda::WarpMeeting& meeting) {
  WgmmaQueue& queue = wgmma_queue(meeting.lane[0]);
  queue.groups.push_back(queue.reads.size());
  queue.fenced = false;
}
inline void exchange_wgmma_fence(host_cuda::WarpMeeting& meeting) {
  wgmma_queue(meeting.lane[0]).fenced = true;
}
inline void exchange_wgmma_wait(host_cuda::WarpMeeting& meeting) {
  Untraced untraced;
  WgmmaQueue& queue = wgmma_queue(meeting.lane[0]);
  const size_t pending = wgmma_input(meeting, 0).pending;
  if (queue.groups.size() > pending) {
    const size_t ended = queue.groups.size() - pending, count = queue.groups[ended - 1];
    for (size_t i = 0; i < count; i++)
      if (std::memcmp(host_cuda::state.shared + queue.reads[i].offset, queue.reads[i].words, 16))
        host_cuda::fail("an operand of wgmma changed before its product ended");
    queue.reads.erase(queue.reads.begin(), queue.reads.begin() + count);
    queue.groups.erase(queue.groups.begin(), queue.groups.begin() + ended);
    for (size_t& end : queue.groups) end -= count;
  }
  if (!queue.groups.empty() || queue.sums.empty()) return;
  const size_t count = queue.sums.size() / 32;
  for (int lane = 0; lane < 32; lane++)
    std::copy_n(&queue.sums[lane * count], count, queue.sums_of[lane]);
  queue.sums.clear();
}

inline void meet(const WgmmaInput& input, host_cuda::Exchange exchange) {
  host_cuda::state.current->input = &input;
  host_cuda::sync_warp(~0u, exchange);
}

// At the end of a thread, and after a launch that failed: nothing is left in flight.
inline void check_all_landed() {
  Untraced untraced;
  if (!my_copies().copies.empty())
    host_cuda::fail("a thread exits with cp.async copies it never waited for");
  my_copies().groups.clear();
  if (!wgmma_queue(host_cuda::state.current).sums.empty())
    host_cuda::fail("a thread exits with a wgmma it never waited for");
}
inline void forget_all() {
  for (CopyQueue& queue : copy_queues) queue = {};
  for (WgmmaQueue& queue : wgmma_queues) queue = {};
}
inline const bool hooks_installed = [] {
  host_cuda::thread_exit_hook = check_all_landed;
  host_cuda::abandon_hook = forget_all;
  return true;
}();

}  // namespace twin

HOST_CUDA_BOOKS inline void fence_async_proxy() {
  const unsigned me = host_cuda::state.current->linear;
  twin::fenced_writes[me] = twin::writes_of[me];
}
inline void wgmma_fence() { twin::meet({}, twin::exchange_wgmma_fence); }
inline void wgmma_commit() { twin::meet({}, twin::exchange_wgmma_commit); }
template <int Pending, int Columns>
void wgmma_wait(float (&)[Columns][4]) {
  twin::meet({nullptr, 0, 0, 0, Pending}, twin::exchange_wgmma_wait);
}

// For the tracer, eight lanes note the 8 rows of 16 bytes that one wavefront serves.
template <class T, int Columns>
HOST_CUDA_TWIN void wgmma_m64k16(float (&d)[Columns][4], unsigned long long a,
                                 unsigned long long b) {
#ifdef HOST_CUDA_TRACE
  const int lane = host_cuda::lane(), row = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
  const int first = host_cuda::state.current->linear / 32 % 4 * 16;
  const char* shared = host_cuda::state.shared;
  HOST_CUDA_NOTE(shared + twin::operand_offset(a, first + row, chunk), 16, false);
  for (int n = 0; n < 8 * Columns; n += 16)
    HOST_CUDA_NOTE(shared + twin::operand_offset(b, n + row, chunk), 16, false);
#endif
  twin::meet({&d[0][0], Columns, a, b, 0}, twin::exchange_wgmma<T>);
}

}  // namespace fastalex
