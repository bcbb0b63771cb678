// Records every memory access of every lane, to count sectors a request and shared-memory
// wavefronts a source line.
#pragma once

#include <cstddef>

namespace host_cuda {

// One access of the current lane, made by the instruction before `return_address`; 0 bytes:
// predicated off.
#ifdef HOST_CUDA_TRACE
void note(const void* address, unsigned bytes, bool write, const void* return_address);
#endif

void trace_begin();
// Ends the trace; one line per program counter: "pc space kind requests threads bytes units
// ideal_units".
const char* trace_end();

}  // namespace host_cuda
