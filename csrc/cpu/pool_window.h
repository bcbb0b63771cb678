// What max-pooling of either layout shares: who wins a window, and which taps of it are there.
#pragma once
#include <algorithm>
#include <cstddef>
#include <limits>

#include "block.h"
#include "kernels.h"
#include "scratch.h"
#include "vec.h"

namespace fastalex::cpu::FASTALEX_ISA {

// The largest value so far and the tap it came from. torch's order: a NaN beats everything, the
// last of several NaNs wins, and the first of equal values.
template <class A, bool kTrack>
struct Winner {
  Vec<A> value;
  Mask<A> tap;

  void start(Vec<A> v, int first_tap) {
    value = v;
    if constexpr (kTrack) tap = Mask<A>{} + first_tap;
  }
  void challenge(Vec<A> v, int challenger_tap) {
    const Mask<A> wins = (v > value) | (v != v);
    value = wins ? v : value;
    if constexpr (kTrack) tap = wins ? Mask<A>{} + challenger_tap : tap;
  }
};

// The largest of the blocks that at(0) to at(count - 1) give, NaN winning, without tracking where
// it came from. One maximum a vector, and a comparison to notice a NaN, which is rare; then the
// careful way.
template <class S, class At>
inline Block<S> largest(int64_t count, At&& at) {
  using A = compute_t<S>;
  Block<S> value = at(0);
  StrangeValues<A> nans;
  const auto join = [&](const Block<S>& v) {
    value = by_part<S>([&](int p) { return larger<A>(v.part[p], value.part[p]); });
  };
  const auto see = [&](const Block<S>& v, const Block<S>& w) {
    for (int p = 0; p < kParts<S>; ++p) nans.see_nans(v.part[p], w.part[p]);
  };
  int64_t t = 1;
  if (count % 2 == 0) {
    const Block<S> v = at(t++);
    see(value, v);
    join(v);
  } else {
    see(value, value);
  }
  for (; t < count; t += 2) {
    const Block<S> v = at(t), w = at(t + 1);
    see(v, w);
    join(v);
    join(w);
  }
  if (__builtin_expect(!nans.any(), 1)) return value;
  return by_part<S>([&](int p) {
    Winner<A, false> winner;
    winner.start(at(0).part[p], 0);
    for (t = 1; t < count; ++t) winner.challenge(at(t).part[p], 0);
    return winner.value;
  });
}

// Taps of a window that starts at `start` (negative in the padding): [first, last) lie inside [0,
// extent).
struct TapRange {
  int64_t first, last;

  TapRange(int64_t start, int64_t taps, int64_t dilation, int64_t extent)
      : first(start >= 0 ? 0 : std::min(taps, (-start + dilation - 1) / dilation)),
        last(start >= extent ? 0 : std::min(taps, (extent - start + dilation - 1) / dilation)) {}

  // A dilated window can fall between two edges of a small map and hold padding alone.
  bool empty() const { return first >= last; }
};

// torch gives -inf to a window of padding alone; nobody is its winner, and unpooling passes it
// over.
template <class S, class Offset>
inline void fill_empty_windows(S* y, Offset* offsets, int64_t count) {
  using A = compute_t<S>;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store_up_to(y + i, broadcast(-std::numeric_limits<A>::infinity()), count - i);
  }
  if (offsets != nullptr) std::memset(offsets, 0, count * sizeof(Offset));
}

}  // namespace fastalex::cpu::FASTALEX_ISA
