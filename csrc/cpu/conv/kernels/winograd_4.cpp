// Winograd transforms for 4x4 kernels.
#include "winograd_rows.h"

namespace fastalex::cpu::FASTALEX_ISA {

const conv::WinogradKernels* winograd_4(int big) {
  static constexpr conv::WinogradKernels kBig4 = WinogradRows<4, 4>::table();
  static constexpr conv::WinogradKernels kBig3 = WinogradRows<4, 3>::table();
  switch (big) {
    case 4:
      return &kBig4;
    case 3:
      return &kBig3;
    default:
      return nullptr;
  }
}

}  // namespace fastalex::cpu::FASTALEX_ISA
