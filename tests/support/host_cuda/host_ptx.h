// The g++ twins of csrc/cuda/ptx.cuh: warp-exact, strict about alignment and range, asynchronous
// copies late on purpose.
#pragma once

#include <vector>

#include "host_cuda.h"
#include "trace.h"

// In a trace build a twin is a call, so that its return address is the kernel's line; its own
// accesses are not traced.
#ifdef HOST_CUDA_TRACE
#define HOST_CUDA_TWIN __attribute__((noinline, no_sanitize("thread")))
#define HOST_CUDA_NOTE(address, bytes, write) \
  host_cuda::note(address, bytes, write, __builtin_return_address(0))
#else
#define HOST_CUDA_TWIN
#define HOST_CUDA_NOTE(address, bytes, write)
#endif

// The twins' own books are kept by whichever thread runs, and are neither traced nor raced for.
#define HOST_CUDA_BOOKS __attribute__((noinline, no_sanitize("thread")))

namespace fastalex {

using SharedAddress = char*;

inline char* dynamic_shared() { return host_cuda::state.shared; }
inline SharedAddress shared_address(const void* pointer) {
  return static_cast<char*>(const_cast<void*>(pointer));
}

namespace twin {

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    host_cuda::fail(std::string(what) + " is not aligned to its " + std::to_string(bytes) +
                    " bytes");
}
inline bool in_shared(const void* pointer, size_t bytes) {
  auto p = static_cast<const char*>(pointer);
  const host_cuda::State& s = host_cuda::state;
  return p >= s.shared && p + bytes <= s.shared + s.shared_bytes;
}

// Who wrote each 16 bytes of shared memory, and how many writes ago: fence_async_proxy hands over
// what its thread wrote before it.
struct SharedWrite {
  unsigned short thread;
  unsigned long count;
};
inline SharedWrite shared_writes[host_cuda::kMaxSharedBytes / 16];
inline unsigned long writes_of[host_cuda::kMaxThreads], fenced_writes[host_cuda::kMaxThreads];

HOST_CUDA_BOOKS inline void wrote_shared(const void* pointer) {
  const unsigned me = host_cuda::state.current->linear;
  const size_t place = (static_cast<const char*>(pointer) - host_cuda::state.shared) / 16;
  shared_writes[place] = {static_cast<unsigned short>(me), ++writes_of[me]};
}
HOST_CUDA_BOOKS inline bool is_handed_over(size_t offset) {
  const SharedWrite& write = shared_writes[offset / 16];
  return write.count <= fenced_writes[write.thread];
}

}  // namespace twin

template <class Word>
HOST_CUDA_TWIN Word load_global(const Word* pointer) {
  twin::check_aligned(pointer, sizeof(Word), "a global load");
  HOST_CUDA_NOTE(pointer, sizeof(Word), false);
  return *pointer;
}
template <class Word>
HOST_CUDA_TWIN void store_global(Word* pointer, Word word) {
  twin::check_aligned(pointer, sizeof(Word), "a global store");
  HOST_CUDA_NOTE(pointer, sizeof(Word), true);
  *pointer = word;
}
template <class Word>
HOST_CUDA_TWIN Word load_shared(const Word* pointer) {
  twin::check_aligned(pointer, sizeof(Word), "a shared load");
  if (!twin::in_shared(pointer, sizeof(Word))) host_cuda::fail("a shared load is out of range");
  HOST_CUDA_NOTE(pointer, sizeof(Word), false);
  return *pointer;
}
template <class Word>
__attribute__((always_inline)) inline Word load_shared(SharedAddress address) {
  return load_shared(reinterpret_cast<const Word*>(address));
}
template <class Word>
HOST_CUDA_TWIN void store_shared(Word* pointer, Word word) {
  twin::check_aligned(pointer, sizeof(Word), "a shared store");
  if (!twin::in_shared(pointer, sizeof(Word))) host_cuda::fail("a shared store is out of range");
  twin::wrote_shared(pointer);
  HOST_CUDA_NOTE(pointer, sizeof(Word), true);
  *pointer = word;
}

namespace twin {

// An instruction that may err by `ulps` does so here, up or down by its argument's bits.
inline float err_by(int ulps, float x, float exact) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const float toward = (bits * 2654435761u >> 31) ? 0.0f : INFINITY;
  if (!std::isfinite(exact) || exact == 0.0f) return exact;
  for (int i = 0; i < ulps; i++) exact = std::nextafter(exact, toward);
  return exact;
}

}  // namespace twin

inline float inverse_root(float x) { return twin::err_by(2, x, 1.0f / std::sqrt(x)); }
inline float approximate_root(float x) { return twin::err_by(1, x, std::sqrt(x)); }

namespace twin {

inline float widen(__half, uint16_t bits) {
  __half h;
  std::memcpy(static_cast<void*>(&h), &bits, 2);
  return __half2float(h);
}
inline float widen(__nv_bfloat16, uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}
inline float as_float(unsigned bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Lane l receives two neighbours of row l/4 of each matrix or, transposed, of column l/4.
template <bool Transposed>
void exchange_ldmatrix(host_cuda::WarpMeeting& meeting) {
  for (int lane = 0; lane < 32; lane++)
    for (int matrix = 0; matrix < 4; matrix++) {
      uint16_t pair[2];
      for (int e = 0; e < 2; e++) {
        const int across = 2 * (lane % 4) + e, along = lane / 4;
        const int row = Transposed ? across : along, column = Transposed ? along : across;
        pair[e] = static_cast<const uint16_t*>(meeting.lane[8 * matrix + row]->input)[column];
      }
      static_cast<unsigned*>(meeting.lane[lane]->output)[matrix] = pair[0] | unsigned{pair[1]}
                                                                                 << 16;
    }
}

// Each lane reads its own row itself, so that the sanitizers see the access where it happens.
template <bool Transposed>
__attribute__((always_inline)) inline void ldmatrix(unsigned (&r)[4], SharedAddress row) {
  check_aligned(row, 16, "an ldmatrix row");
  if (!in_shared(row, 16)) host_cuda::fail("an ldmatrix row is out of range");
  uint32_t mine[4], out[4];
  for (int i = 0; i < 4; i++) mine[i] = reinterpret_cast<const uint32_t*>(row)[i];
  host_cuda::state.current->input = mine;
  host_cuda::state.current->output = out;
  host_cuda::sync_warp(~0u, exchange_ldmatrix<Transposed>);
  for (int i = 0; i < 4; i++) r[i] = out[i];
}

struct MmaInput {
  unsigned a[4], b[2];
  float c[4];
};

// Rebuilds both matrices from the lanes' fragments, multiplies, hands the sums back.
template <int K, class Read>
void exchange_mma(host_cuda::WarpMeeting& meeting, Read read) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; lane++)
    read(*static_cast<const MmaInput*>(meeting.lane[lane]->input), lane / 4, lane % 4, a, b);
  for (int lane = 0; lane < 32; lane++)
    for (int e = 0; e < 4; e++) {
      const int row = lane / 4 + e / 2 * 8, column = 2 * (lane % 4) + e % 2;
      float sum = static_cast<const MmaInput*>(meeting.lane[lane]->input)->c[e];
      for (int k = 0; k < K; k++) sum += a[row][k] * b[k][column];
      static_cast<float*>(meeting.lane[lane]->output)[e] = sum;
    }
}

template <class T>
void exchange_mma_half(host_cuda::WarpMeeting& meeting) {
  exchange_mma<16>(meeting, [](const MmaInput& f, int g, int t, float (*a)[16], float (*b)[8]) {
    for (int h = 0; h < 2; h++) {
      const auto half = [h](unsigned word) { return widen(T(), uint16_t(word >> 16 * h)); };
      a[g][2 * t + h] = half(f.a[0]), a[g + 8][2 * t + h] = half(f.a[1]);
      a[g][2 * t + 8 + h] = half(f.a[2]), a[g + 8][2 * t + 8 + h] = half(f.a[3]);
      b[2 * t + h][g] = half(f.b[0]), b[2 * t + 8 + h][g] = half(f.b[1]);
    }
  });
}
inline void exchange_mma_tf32(host_cuda::WarpMeeting& meeting) {
  exchange_mma<8>(meeting, [](const MmaInput& f, int g, int t, float (*a)[8], float (*b)[8]) {
    for (unsigned word : {f.a[0], f.a[1], f.a[2], f.a[3], f.b[0], f.b[1]})
      if ((word & 0x1fff) && (word & 0x7fffff) != 0x7fffff)
        host_cuda::fail("a tf32 operand was not rounded by to_tf32");
    a[g][t] = as_float(f.a[0]), a[g + 8][t] = as_float(f.a[1]);
    a[g][t + 4] = as_float(f.a[2]), a[g + 8][t + 4] = as_float(f.a[3]);
    b[t][g] = as_float(f.b[0]), b[t + 4][g] = as_float(f.b[1]);
  });
}

inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                host_cuda::Exchange exchange) {
  const MmaInput input{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  float out[4];
  host_cuda::state.current->input = &input;
  host_cuda::state.current->output = out;
  host_cuda::sync_warp(~0u, exchange);
  for (int i = 0; i < 4; i++) d[i] = out[i];
}

// The bytes are fetched at issue, the destination turns to NaN, and the copy lands at its wait: a
// reader that comes too early or a writer that comes too late both show.
struct Copy {
  char* destination;
  int bytes;
  uint32_t words[4];
};
struct CopyQueue {
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies issued up to each commit
};
inline CopyQueue copy_queues[host_cuda::kMaxThreads];

inline CopyQueue& my_copies() { return copy_queues[host_cuda::state.current->linear]; }

// State kept outside the kernel is not the kernel's memory traffic.
class Untraced {
 public:
  HOST_CUDA_BOOKS Untraced() : was_(host_cuda::state.in_kernel) {
    host_cuda::state.in_kernel = false;
  }
  HOST_CUDA_BOOKS ~Untraced() { host_cuda::state.in_kernel = was_; }

 private:
  bool was_;
};

inline void land(CopyQueue& queue, size_t count) {
  for (size_t i = 0; i < count; i++) {
    wrote_shared(queue.copies[i].destination);
    for (int w = 0; w < queue.copies[i].bytes / 4; w++)
      reinterpret_cast<uint32_t*>(queue.copies[i].destination)[w] = queue.copies[i].words[w];
  }
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + count);
}

}  // namespace twin

HOST_CUDA_TWIN inline void ldmatrix_x4(unsigned (&r)[4], SharedAddress row) {
  HOST_CUDA_NOTE(row, 16, false);
  twin::ldmatrix<false>(r, row);
}
HOST_CUDA_TWIN inline void ldmatrix_x4_trans(unsigned (&r)[4], SharedAddress row) {
  HOST_CUDA_NOTE(row, 16, false);
  twin::ldmatrix<true>(r, row);
}

template <int Bytes>
HOST_CUDA_TWIN void cp_async(SharedAddress destination, const void* source, int valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  twin::check_aligned(destination, Bytes, "a cp.async destination");
  twin::check_aligned(source, Bytes, "a cp.async source");
  if (valid < 0 || valid > Bytes)
    host_cuda::fail("cp.async reads fewer than 0 or more than all bytes");
  if (!twin::in_shared(destination, Bytes))
    host_cuda::fail("cp.async writes outside shared memory");
  HOST_CUDA_NOTE(source, valid, false);
  HOST_CUDA_NOTE(destination, Bytes, true);
  twin::Untraced untraced;
  twin::Copy copy{destination, Bytes, {}};
  auto bytes = reinterpret_cast<char*>(copy.words);
  for (int i = 0; i < valid; i++) bytes[i] = static_cast<const char*>(source)[i];
  for (int w = 0; w < Bytes / 4; w++) reinterpret_cast<uint32_t*>(destination)[w] = 0xffffffffu;
  twin::my_copies().copies.push_back(copy);
}
HOST_CUDA_TWIN inline void cp_async_commit() {
  twin::Untraced untraced;
  twin::CopyQueue& queue = twin::my_copies();
  queue.groups.push_back(queue.copies.size());
}
template <int Pending>
HOST_CUDA_TWIN void cp_async_wait() {
  twin::Untraced untraced;
  twin::CopyQueue& queue = twin::my_copies();
  if (queue.groups.size() <= Pending) return;
  const size_t landed = queue.groups.size() - Pending, count = queue.groups[landed - 1];
  twin::land(queue, count);
  queue.groups.erase(queue.groups.begin(), queue.groups.begin() + landed);
  for (size_t& end : queue.groups) end -= count;
}

template <class T>
void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  twin::mma(d, a, b0, b1, twin::exchange_mma_half<T>);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  twin::mma(d, a, b0, b1, twin::exchange_mma_tf32);
}
// To nearest, ties away from zero; NaN and infinity keep their meaning.
inline unsigned to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace fastalex

#include "host_wgmma.h"
