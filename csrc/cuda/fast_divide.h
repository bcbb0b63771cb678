// Division by a number known only at launch, for 0 <= n < 2^31, as one multiplication (Granlund and
// Montgomery).
#pragma once

namespace fastalex {

struct FastDivide {
  unsigned divisor, magic, shift;

#ifdef __CUDACC__
  __device__
#endif
      int operator()(int n) const {
    const unsigned long long product =
        static_cast<unsigned long long>(static_cast<unsigned>(n)) * magic;
    return static_cast<int>((static_cast<unsigned>(product >> 32) + static_cast<unsigned>(n)) >>
                            shift);
  }
};

#ifndef __CUDACC_RTC__
inline FastDivide fast_divide(long long divisor) {
  FastDivide f = {static_cast<unsigned>(divisor), 0, 0};
  while ((1ull << f.shift) < f.divisor) f.shift++;
  f.magic = static_cast<unsigned>(((1ull << 32) * ((1ull << f.shift) - f.divisor)) / f.divisor + 1);
  return f;
}
#endif

}  // namespace fastalex
