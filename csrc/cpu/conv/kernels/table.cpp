// One instruction set's table of convolution kernels.
#include "../../isa.h"
#include "../../vec.h"
#include "copy.h"
#include "dot.h"
#include "gemm.h"
#include "pairs.h"
#include "winograd_rows.h"

namespace fastalex::cpu::FASTALEX_ISA {
namespace {

const conv::WinogradKernels* winograd(int taps, int big) {
  switch (taps) {
    case 2:
      return winograd_2(big);
    case 3:
      return winograd_3(big);
    case 4:
      return winograd_4(big);
    case 5:
      return winograd_5(big);
    default:
      return nullptr;
  }
}

}  // namespace

const conv::ConvKernels& conv_kernels() {
  static constexpr conv::ConvKernels kernels{
      .lanes = kLanes<float>,
      .has_pairs = has_bfloat16_instructions,
      .max_rows = kMaxRows,
      .dot_outputs = kDotOutputs,
      .gemm = gemm,
      .outer = outer,
      .gather = gather,
      .scatter = scatter,
      .add = add,
      .affine = affine,
      .dot = dot,
      .add_lanes = add_lanes,
      .winograd = winograd,
  };
  return kernels;
}

}  // namespace fastalex::cpu::FASTALEX_ISA
