// A thread's working memory: aligned, sized once per parallel range, NaN-filled under test.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "isa.h"
#include "poison.h"

namespace fastalex::cpu::FASTALEX_ISA {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
    if (data_ == nullptr) out_of_memory(bytes);
    if (poison_enabled()) std::memset(static_cast<void*>(data_), 0xff, bytes);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace fastalex::cpu::FASTALEX_ISA
