// Large working memory: aligned, on huge pages, NaN-filled and fenced by canaries under test.
#include "buffer.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "poison.h"
#include "redzone.h"
#include "require.h"

namespace fastalex::cpu {
namespace {

constexpr size_t kAlignment = 64, kFence = 64, kHugePage = size_t{2} << 20;
constexpr int kPoison = 0xff;  // as bytes of a float: NaN

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

void out_of_memory(size_t bytes) {
  fail("not enough memory for ", bytes, " bytes of working memory: make the batch smaller");
}

void use_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  if (bytes < 2 * kHugePage) return;
  constexpr uintptr_t kPage = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = round_up(begin, kPage);
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kPage * kPage, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

Buffer::Buffer(size_t bytes) { reserve(bytes); }

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(capacity_, other.capacity_);
  std::swap(reserved_, other.reserved_);
  std::swap(fenced_, other.fenced_);
  return *this;
}

Buffer::~Buffer() { std::free(data_); }

void Buffer::reserve(size_t bytes) {
  if (bytes + kFence > capacity_) {
    std::free(data_);
    const bool huge = bytes >= 2 * kHugePage;
    capacity_ = round_up(bytes + kFence, huge ? kHugePage : kAlignment);
    data_ = static_cast<char*>(std::aligned_alloc(huge ? kHugePage : kAlignment, capacity_));
    if (data_ == nullptr) {
      capacity_ = 0;
      out_of_memory(bytes);
    }
    use_huge_pages(data_, capacity_);
  }
  reserved_ = bytes;
  allow(data_, reserved_ + kFence);
  forbid(data_ + reserved_ + kFence, capacity_ - reserved_ - kFence);
  fenced_ = poison_enabled();
  if (fenced_) std::memset(data_, kPoison, reserved_ + kFence);
}

size_t Buffer::usable() const { return capacity_ > kFence ? capacity_ - kFence : 0; }

void Buffer::check() const {
  if (!fenced_) return;
  const char* fence = data_ + reserved_;
  if (std::all_of(fence, fence + kFence, [](char c) { return c == static_cast<char>(kPoison); })) {
    return;
  }
  std::fputs("fastalex: a kernel wrote beyond its working memory\n", stderr);
  std::abort();
}

}  // namespace fastalex::cpu
