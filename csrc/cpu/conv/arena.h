// Carves one scratch buffer into aligned float arrays; without a buffer it only measures.
#pragma once
#include "part.h"

namespace fastalex::cpu::conv {

class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  float* take(int64_t floats) {
    char* data = base_ + bytes_;
    bytes_ += align_up(static_cast<size_t>(floats) * sizeof(float));
    return base_ ? reinterpret_cast<float*>(data) : nullptr;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace fastalex::cpu::conv
