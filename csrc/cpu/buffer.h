// Large working memory: aligned, on huge pages, NaN-filled and fenced by canaries under test.
#pragma once
#include <cstddef>

namespace fastalex::cpu {

// Asks for huge pages: fresh memory otherwise costs a page fault every 4 KiB, together several
// times what an operator does.
void use_huge_pages(void* data, size_t bytes);

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  // Makes at least `bytes` usable; what was there is gone.
  void reserve(size_t bytes);
  char* data() const { return data_; }
  size_t capacity() const { return capacity_; }
  size_t usable() const;  // the most that reserve() takes without new memory
  // Ends the process, which is under test, if memory beyond the reserved bytes was written.
  void check() const;

 private:
  char* data_ = nullptr;
  size_t capacity_ = 0, reserved_ = 0;
  bool fenced_ = false;
};

}  // namespace fastalex::cpu
