// What new memory asks of the library: whether to fill it with NaN, and the error where there is
// none.
#pragma once
#include <cstddef>

namespace fastalex::cpu {

// A test sees then every element nobody wrote.
bool poison_enabled();

[[noreturn]] void out_of_memory(size_t bytes);

}  // namespace fastalex::cpu
