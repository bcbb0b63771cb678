// The library's state, as its operators see it.
#pragma once
#include <string>

#include "kernels.h"

namespace fastalex::cpu {

// The kernels of the instruction set in use: the best this CPU runs, unless set_isa chose another.
const Kernels& kernels();

std::string isa();
std::string available_isas();    // comma-separated, best first
void set_isa(std::string name);  // throws for one unknown, or that this CPU cannot run
void set_poison(bool enabled);

}  // namespace fastalex::cpu
