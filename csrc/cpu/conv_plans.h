// Plans of convolutions, kept so that a call does not make its own. No torch here.
#pragma once
#include <memory>

#include "conv/conv.h"

namespace fastalex::cpu {

// The plan for the instruction set and number of threads in use, made at the first call that needs
// it. Engine::kAuto and tile 0 leave the choice to the cost model.
std::shared_ptr<const conv::Plan> plan_for(const conv::Problem& problem, conv::Pass pass,
                                           conv::Engine engine, int tile);

}  // namespace fastalex::cpu
