// Local response normalization, forward and backward: threads, layouts and dtypes around the row
// kernels.
#include "lrn_rows.h"
#include "op_entries.h"
#include "parallel.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

// Adjacent pixels of an NCHW map that one work item normalises, all channels together.
constexpr int64_t kItemPixels = 512;

// Cuts a map into work items: a row of pixels (channels_last) or a run of them (NCHW).
struct Items {
  const Map& map;
  int64_t per_image =
      map.channels_last ? map.height : (map.height * map.width + kItemPixels - 1) / kItemPixels;

  int64_t count() const { return map.batch * per_image; }
  int64_t elements() const {
    return map.channels *
           (map.channels_last ? map.width : std::min(kItemPixels, map.height * map.width));
  }
  int64_t pixels(int64_t item) const {
    if (map.channels_last) return map.width;
    return std::min(kItemPixels, map.height * map.width - item % per_image * kItemPixels);
  }
};

// Where the pixels of an item begin in a map of the same shape.
template <class T>
T* start(const Items& items, const Map& map, int64_t item) {
  const int64_t n = item / items.per_image, i = item % items.per_image;
  return map.channels_last ? row_at<T>(map, n, i) : plane_at<T>(map, n, 0) + i * kItemPixels;
}

// Reads x once and writes y once.
template <class S>
void forward(const LrnCall& call) {
  const Items items{call.input};
  parallel_for(items.count(), grain(items.elements()), [&](int64_t begin, int64_t end) {
    const auto kernel = make_lrn_forward<S>(call.lrn, call.input);
    for (int64_t item = begin; item < end; ++item) {
      kernel->run(start<const S>(items, call.input, item), call.input.step(),
                  start<S>(items, call.output, item), call.output.step(), items.pixels(item));
    }
  });
}

// Reads g and x once and writes gx once.
template <class S>
void backward(const LrnBackwardCall& call) {
  const Items items{call.input};
  parallel_for(items.count(), grain(items.elements()), [&](int64_t begin, int64_t end) {
    const auto kernel = make_lrn_backward<S, S>(call.lrn, call.input);
    for (int64_t item = begin; item < end; ++item) {
      kernel->run(start<const S>(items, call.grad, item), call.grad.step(),
                  start<const S>(items, call.input, item), call.input.step(),
                  start<S>(items, call.grad_input, item), call.grad_input.step(),
                  items.pixels(item));
    }
  });
}

}  // namespace

void lrn(const LrnCall& call) {
  visit_dtype(call.dtype, [&](auto storage) { forward<decltype(storage)>(call); });
}

void lrn_backward(const LrnBackwardCall& call) {
  visit_dtype(call.dtype, [&](auto storage) { backward<decltype(storage)>(call); });
}

}  // namespace fastalex::cpu::FASTALEX_ISA
