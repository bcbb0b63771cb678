// Pixels between the caller's layout and type and the engine's float, channels-last scratch.
#pragma once
#include "../kernels.h"

namespace fastalex::cpu::FASTALEX_ISA {

void gather(const conv::GatherCall& call);
void scatter(const conv::ScatterCall& call);
void add(const conv::AddCall& call);
void affine(const conv::AffineCall& call);

}  // namespace fastalex::cpu::FASTALEX_ISA
