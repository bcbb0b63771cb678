// Small kernels that test the host runtime itself: each proves a twin exact, or a misuse caught.
#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "fast_divide.h"
#include "host_cuda.h"
#include "ptx.cuh"

using namespace fastalex;

namespace {

void expect(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}
void run(unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  host_cuda::run(dim3(1), dim3(threads), shared_bytes, kernel);
}
float draw(int i) {
  return static_cast<float>((static_cast<unsigned>(i) * 2654435761u >> 20) % 17) - 8.0f;
}

template <class T>
union Pack16 {
  T value;
  unsigned short word;
  Pack16() {}
};

// PTX ISA, fragments of mma.m16n8k16: where element i of a lane lies in A (16x16), B (16x8) and C
// (16x8).
int row_a(int lane, int i) { return lane / 4 + (i / 2 % 2) * 8; }
int column_a(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 4 * 8; }
int row_b(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
int row_c(int lane, int i) { return lane / 4 + i / 2 * 8; }
int column_c(int lane, int i) { return lane % 4 * 2 + i % 2; }

template <class T>
void mma_is_a_matrix_product() {
  static float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 256; i++) a[i / 16][i % 16] = draw(i);
  for (int i = 0; i < 128; i++) b[i / 8][i % 8] = draw(1000 + i);
  run(32, 0, [] {
    const int lane = threadIdx.x;
    T fa[8], fb[4];
    for (int i = 0; i < 8; i++) fa[i] = T(a[row_a(lane, i)][column_a(lane, i)]);
    for (int i = 0; i < 4; i++) fb[i] = T(b[row_b(lane, i)][lane / 4]);
    unsigned wa[4], wb[2];
    std::memcpy(wa, fa, sizeof wa), std::memcpy(wb, fb, sizeof wb);
    float sum[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    mma_m16n8k16<T>(sum, wa, wb[0], wb[1]);
    for (int i = 0; i < 4; i++)
      d[row_c(lane, i)][column_c(lane, i)] = sum[i] - static_cast<float>(i + 1);
  });
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 8; c++) {
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[r][k] * b[k][c];
      expect(d[r][c] == sum, "mma.m16n8k16 differs from a matrix product");
    }
}

void tf32_mma_rounds_its_operands() {
  static float a[16][8], b[8][8], d[16][8];
  for (int i = 0; i < 128; i++) a[i / 8][i % 8] = draw(i) * 1.2345f;
  for (int i = 0; i < 64; i++) b[i / 8][i % 8] = draw(77 + i) * 0.777f;
  run(32, 0, [] {
    const int lane = threadIdx.x;
    unsigned wa[4];
    for (int i = 0; i < 4; i++) wa[i] = to_tf32(a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4]);
    float sum[4] = {};
    mma_m16n8k8_tf32(sum, wa, to_tf32(b[lane % 4][lane / 4]), to_tf32(b[lane % 4 + 4][lane / 4]));
    for (int i = 0; i < 4; i++) d[row_c(lane, i)][column_c(lane, i)] = sum[i];
  });
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 8; c++) {
      float sum = 0;
      for (int k = 0; k < 8; k++)
        sum += twin::as_float(to_tf32(a[r][k])) * twin::as_float(to_tf32(b[k][c]));
      expect(d[r][c] == sum, "the tf32 mma differs from a product of rounded values");
    }
  expect(to_tf32(1.0f + 0x1p-11f) == 0x3f802000u && to_tf32(-1.0f - 0x1p-11f) == 0xbf802000u,
         "to_tf32 must round ties away from zero");
  expect(to_tf32(1.0f + 0x1p-12f) == 0x3f800000u, "to_tf32 must round to nearest");
}

// The 64-byte swizzle as the PTX ISA draws it: 16-byte chunk c of row r lies at chunk c ^ (r / 2 %
// 4).
int swizzled_place(int row, int k) {
  return row * 32 + (k / 8 ^ row / 2 % 4) * 8 + k % 8;  // in values
}
// By hand: address / 16, a leading distance of 1, 512 / 16 from eight rows to the next, swizzle 2.
unsigned long long descriptor(int byte) {
  return static_cast<unsigned long long>(byte / 16) | 0x8000002000010000ull;
}

template <class T>
void wgmma_is_a_matrix_product() {
  static float a[64][32], b[128][32], d[64][128];
  for (int i = 0; i < 64 * 32; i++) a[i / 32][i % 32] = draw(i);
  for (int i = 0; i < 128 * 32; i++) b[i / 32][i % 32] = draw(5000 + i);
  run(128, (64 + 128) * 64, [] {
    auto values = reinterpret_cast<T*>(dynamic_shared());
    const auto put = [&](int place, float value) {
      Pack16<T> one;
      one.value = T(value);
      store_shared(reinterpret_cast<unsigned short*>(values + place), one.word);
    };
    for (int i = threadIdx.x; i < 64 * 32; i += 128)
      put(swizzled_place(i / 32, i % 32), a[i / 32][i % 32]);
    for (int i = threadIdx.x; i < 128 * 32; i += 128)
      put(64 * 32 + swizzled_place(i / 32, i % 32), b[i / 32][i % 32]);
    fence_async_proxy();
    __syncthreads();
    float sum[16][4];
    for (auto& four : sum)
      for (float& one : four) one = 1.0f;
    wgmma_fence();
    for (int step = 0; step < 2; step++)
      wgmma_m64k16<T>(sum, descriptor(step * 32), descriptor(64 * 64 + step * 32));
    wgmma_commit();
    if (sum[3][1] == sum[3][1]) host_cuda::fail("sums of a running wgmma must read as NaN");
    wgmma_wait<0>(sum);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int c = 0; c < 16; c++)
      for (int e = 0; e < 4; e++)
        d[warp * 16 + row_c(lane, e)][c * 8 + column_c(lane, e)] = sum[c][e] - 1.0f;
  });
  for (int r = 0; r < 64; r++)
    for (int c = 0; c < 128; c++) {
      float sum = 0;
      for (int k = 0; k < 32; k++) sum += a[r][k] * b[c][k];
      expect(d[r][c] == sum, "wgmma differs from a matrix product");
    }
}

// A warpgroup that breaks one rule: an operand not handed over, or changed too early, no fence, no
// wait, a descriptor off its pattern.
enum class Broken { proxy, operand, fence, wait, pattern };
template <Broken Rule>
void misuse_wgmma() {
  run(128, (64 + 128) * 64, [] {
    auto words = reinterpret_cast<unsigned*>(dynamic_shared());
    for (int i = threadIdx.x; i < (64 + 128) * 16; i += 128) store_shared(words + i, 0u);
    if (Rule != Broken::proxy) fence_async_proxy();
    __syncthreads();
    float sum[16][4] = {};
    if (Rule != Broken::fence) wgmma_fence();
    wgmma_m64k16<__half>(sum, descriptor(Rule == Broken::pattern ? 128 : 0), descriptor(64 * 64));
    wgmma_commit();
    __syncthreads();
    if (Rule == Broken::operand) store_shared(words + threadIdx.x, 1u);
    __syncthreads();
    if (Rule != Broken::wait) wgmma_wait<0>(sum);
  });
}

void ldmatrix_hands_out_rows_and_columns() {
  static unsigned rows[32][4], columns[32][4];
  run(32, 512, [] {
    auto values = reinterpret_cast<uint16_t*>(dynamic_shared());
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32)
      values[i] = static_cast<uint16_t>(i);  // matrix * 64 + row * 8 + column
    __syncthreads();
    ldmatrix_x4(rows[lane], shared_address(values + lane * 8));
    ldmatrix_x4_trans(columns[lane], shared_address(values + lane * 8));
  });
  for (int lane = 0; lane < 32; lane++)
    for (int m = 0; m < 4; m++) {
      const unsigned row = m * 64 + lane / 4 * 8 + lane % 4 * 2,
                     column = m * 64 + lane % 4 * 16 + lane / 4;
      expect(rows[lane][m] == (row | (row + 1) << 16), "ldmatrix handed out a wrong row");
      expect(columns[lane][m] == (column | (column + 8) << 16),
             "ldmatrix.trans handed out a wrong column");
    }
}

void copies_land_at_their_wait() {
  alignas(16) static unsigned source[12];
  static unsigned seen[6];
  for (int i = 0; i < 12; i++) source[i] = i + 1;
  run(1, 128, [] {
    char* shared = dynamic_shared();
    const auto word = [&](int i) { return reinterpret_cast<volatile unsigned*>(shared)[i]; };
    cp_async<16>(shared, source, 16);
    cp_async_commit();
    cp_async<8>(shared + 16, source + 4, 4);
    cp_async<4>(shared + 24, source + 6, 0);
    cp_async_commit();
    seen[0] = word(0);
    cp_async_wait<1>();
    seen[1] = word(3), seen[2] = word(4);
    cp_async_commit();
    cp_async_wait<1>();  // an empty group counts as a group
    seen[3] = word(4), seen[4] = word(5), seen[5] = word(6);
    cp_async_wait<0>();
  });
  expect(seen[0] == ~0u && seen[2] == ~0u, "a copy in flight must read as NaN");
  expect(seen[1] == 4 && seen[3] == 5, "a copy that was waited for must have landed");
  expect(seen[4] == 0 && seen[5] == 0, "bytes past the valid ones must be zero");
}

void barriers_order_threads() {
  static int total;
  run(96, 96 * 4, [] {
    auto values = reinterpret_cast<int*>(dynamic_shared());
    const int i = threadIdx.x;
    values[i] = i;
    for (int step = 1; step < 96; step *= 2) {
      __syncthreads();
      const int other = i + step < 96 ? values[i + step] : 0;
      __syncthreads();
      values[i] += other;
    }
    if (i == 0) total = values[0];
    const int swapped = __shfl_xor_sync(~0u, i, 5);
    if (swapped != (i ^ 5)) host_cuda::fail("shuffle exchanged wrong lanes");
  });
  expect(total == 96 * 95 / 2, "a tree sum through shared memory is wrong");
}

void roots_err_by_what_is_documented() {
  int worst = 0, exact = 0;
  for (int i = 1; i < 5000; i++) {
    const float x = static_cast<float>(i) * 0.37f, good = 1.0f / std::sqrt(x),
                bad = inverse_root(x);
    const int apart =
        std::abs(static_cast<int>((bad - good) / (std::nextafter(good, INFINITY) - good)));
    worst = std::max(worst, apart), exact += bad == good;
  }
  expect(worst == 2 && exact == 0, "inverse_root must err by 2 ulp everywhere");
  expect(inverse_root(INFINITY) == 0.0f && std::isinf(inverse_root(0.0f)),
         "inverse_root at its ends");
}

void fast_division_is_exact() {
  for (long long divisor : {1, 2, 3, 5, 7, 27, 96, 363, 1000003, 0x7fffffff}) {
    const FastDivide by = fast_divide(divisor);
    for (long long n :
         {0ll, 1ll, divisor - 1, divisor, 2 * divisor - 1, 12345678ll, 0x7ffffffell, 0x7fffffffll})
      if (n <= 0x7fffffffll) expect(by(static_cast<int>(n)) == n / divisor, "FastDivide is wrong");
  }
}

alignas(16) unsigned misuse_source[64];

const std::map<std::string, std::function<void()>> checks = {
    {"mma float16", mma_is_a_matrix_product<__half>},
    {"mma bfloat16", mma_is_a_matrix_product<__nv_bfloat16>},
    {"mma tf32", tf32_mma_rounds_its_operands},
    {"wgmma float16", wgmma_is_a_matrix_product<__half>},
    {"wgmma bfloat16", wgmma_is_a_matrix_product<__nv_bfloat16>},
    {"ldmatrix", ldmatrix_hands_out_rows_and_columns},
    {"cp.async", copies_land_at_their_wait},
    {"barriers", barriers_order_threads},
    {"roots", roots_err_by_what_is_documented},
    {"division", fast_division_is_exact},
    {"misuse: copy to an odd address",
     [] { run(1, 64, [] { cp_async<16>(dynamic_shared() + 8, misuse_source, 16); }); }},
    {"misuse: copy from an odd address",
     [] { run(1, 64, [] { cp_async<16>(dynamic_shared(), misuse_source + 1, 16); }); }},
    {"misuse: copy outside shared memory",
     [] { run(1, 16, [] { cp_async<16>(dynamic_shared() + 16, misuse_source, 16); }); }},
    {"misuse: exit without a wait",
     [] {
       run(1, 64, [] {
         cp_async<16>(dynamic_shared(), misuse_source, 16);
         cp_async_commit();
       });
     }},
    {"misuse: half a warp at ldmatrix",
     [] {
       run(32, 512, [] {
         unsigned r[4];
         if (threadIdx.x < 16) ldmatrix_x4(r, shared_address(dynamic_shared() + threadIdx.x * 16));
       });
     }},
    {"misuse: tf32 operand not rounded",
     [] {
       run(32, 0, [] {
         const unsigned a[4] = {0x3f800001u, 0, 0, 0};
         float d[4] = {};
         mma_m16n8k8_tf32(d, a, 0, 0);
       });
     }},
    {"misuse: wgmma before a proxy fence", misuse_wgmma<Broken::proxy>},
    {"misuse: wgmma operand overwritten", misuse_wgmma<Broken::operand>},
    {"misuse: wgmma without its fence", misuse_wgmma<Broken::fence>},
    {"misuse: wgmma never waited for", misuse_wgmma<Broken::wait>},
    {"misuse: wgmma operand off its pattern", misuse_wgmma<Broken::pattern>},
    {"misuse: threads at different barriers",
     [] { run(64, 0, [] { threadIdx.x < 16 ? __syncthreads() : __syncwarp(); }); }},
    {"misuse: store past shared memory",
     [] {
       run(1, 16, [] { store_shared(reinterpret_cast<unsigned*>(dynamic_shared() + 16), 1u); });
     }},
    {"misuse: plain write past shared memory",
     [] { run(1, 16, [] { dynamic_shared()[17] = 0; }); }},
    {"misuse: unaligned vector load",
     [] { run(1, 0, [] { load_global(reinterpret_cast<const uint4*>(misuse_source + 1)); }); }},
    {"misuse: too many threads", [] { run(1056, 0, [] {}); }},
};

}  // namespace

// All names, a line each.
extern "C" __attribute__((visibility("default"))) const char* host_cuda_checks() {
  static std::string names;
  names.clear();
  for (const auto& [name, check] : checks) names += name + "\n";
  return names.c_str();
}
// Null if the check passed, else what it found.
extern "C" __attribute__((visibility("default"))) const char* host_cuda_check(const char* name) {
  static std::string message;
  try {
    checks.at(name)();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
