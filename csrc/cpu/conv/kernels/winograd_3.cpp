// Winograd transforms for 3x3 kernels.
#include "winograd_rows.h"

namespace fastalex::cpu::FASTALEX_ISA {

const conv::WinogradKernels* winograd_3(int big) {
  static constexpr conv::WinogradKernels kBig6 = WinogradRows<3, 6>::table();
  static constexpr conv::WinogradKernels kBig5 = WinogradRows<3, 5>::table();
  static constexpr conv::WinogradKernels kBig4 = WinogradRows<3, 4>::table();
  static constexpr conv::WinogradKernels kBig3 = WinogradRows<3, 3>::table();
  static constexpr conv::WinogradKernels kBig7 = WinogradRows<3, 7>::table();
  switch (big) {
    case 6:
      return &kBig6;
    case 5:
      return &kBig5;
    case 4:
      return &kBig4;
    case 3:
      return &kBig3;
    case 7:
      return &kBig7;
    default:
      return nullptr;
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
