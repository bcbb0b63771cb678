// Carves one scratch buffer into aligned float arrays; without a buffer it only measures.
#pragma once
#include "../redzone.h"
#include "part.h"

namespace fastalex::cpu::conv {

class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}

  float* take(int64_t floats) {
    const size_t begin = bytes_, end = begin + static_cast<size_t>(floats) * sizeof(float);
    bytes_ = align_up(end) + kRedZone;
    if (!base_) return nullptr;
    allow(base_ + begin, end - begin);  // red zones of another carving may lie here
    forbid(base_ + end, bytes_ - end);
    return reinterpret_cast<float*>(base_ + begin);
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace fastalex::cpu::conv
