// Tiles whose Winograd sums met NaN or infinity, recomputed directly so that only true results
// stay.
#pragma once
#include <atomic>
#include <mutex>
#include <vector>

#include "part.h"
#include "target.h"

namespace fastalex::cpu::conv {

// Output pixels [y, y + rows) x [x, x + columns) of some filters of one image.
struct OutputBox {
  int64_t image;
  int group, filter, filters;
  int y, rows, x, columns;
};

// Collects boxes from all workers; beyond a limit it only remembers that there were more.
class NonfiniteLog {
 public:
  static constexpr size_t kDefaultLimit = 64;
  explicit NonfiniteLog(size_t limit = kDefaultLimit) : limit_(limit) {}

  void add(const OutputBox& box);
  bool empty() const { return boxes_.empty(); }
  bool overflowed() const { return overflowed_; }
  const std::vector<OutputBox>& boxes() const { return boxes_; }

 private:
  size_t limit_;
  std::mutex mutex_;
  std::vector<OutputBox> boxes_;
  bool overflowed_ = false;
};

// Recomputes what the log holds into `target`: box by box, or all of it with the part's direct
// fallback.
void recompute_nonfinite(const ConvKernels& kernels, const Part& part, const Operands& operands,
                         const OutputTarget& target, const NonfiniteLog& log);

}  // namespace fastalex::cpu::conv
