// The row kernels of local response normalization behind one interface a layout-independent caller
// can hold.
#pragma once
#include <memory>

#include "isa.h"
#include "kernels.h"

namespace fastalex::cpu::FASTALEX_ISA {

// channels_last: `count` pixels of all channels, `stride` = elements from a pixel to the next.
// NCHW: `count` adjacent pixels of every channel, `stride` = elements from a channel to the next.
// One instance serves one thread.
template <class S>
class LrnForward {
 public:
  virtual ~LrnForward() = default;
  virtual void run(const S* x, int64_t x_stride, S* y, int64_t y_stride, int64_t count) = 0;
};

// G is the type the incoming gradient is stored in: S, or the compute type where the caller has
// just made it.
template <class S, class G>
class LrnBackward {
 public:
  virtual ~LrnBackward() = default;
  virtual void run(const G* g, int64_t g_stride, const S* x, int64_t x_stride, S* gx,
                   int64_t gx_stride, int64_t count) = 0;
};

template <class S>
std::unique_ptr<LrnForward<S>> make_lrn_forward(const LrnParams& params, const Map& input);

template <class S, class G>
std::unique_ptr<LrnBackward<S, G>> make_lrn_backward(const LrnParams& params, const Map& input);

}  // namespace fastalex::cpu::FASTALEX_ISA
