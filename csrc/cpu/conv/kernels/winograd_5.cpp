// Winograd transforms for 5x5 kernels.
#include "winograd_rows.h"

namespace fastalex::cpu::FASTALEX_ISA {

const conv::WinogradKernels* winograd_5(int big) {
  static constexpr conv::WinogradKernels kBig4 = WinogradRows<5, 4>::table();
  static constexpr conv::WinogradKernels kBig3 = WinogradRows<5, 3>::table();
  static constexpr conv::WinogradKernels kBig5 = WinogradRows<5, 5>::table();
  switch (big) {
    case 4:
      return &kBig4;
    case 3:
      return &kBig3;
    case 5:
      return &kBig5;
    default:
      return nullptr;
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
