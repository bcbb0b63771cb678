// Whether new memory is filled with NaN, so that a test sees every element nobody wrote.
#pragma once

namespace fastalex::cpu {

bool poison_enabled();

}  // namespace fastalex::cpu
