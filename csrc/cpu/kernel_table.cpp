// The table through which one instruction set's kernels are called.
#include "conv/isa_tables.h"
#include "op_entries.h"

namespace fastalex::cpu::FASTALEX_ISA {

#define FASTALEX_TEXT(name) #name
#define FASTALEX_NAME(name) FASTALEX_TEXT(name)

const Kernels kernels = {
    .isa = FASTALEX_NAME(FASTALEX_ISA),
    .lrn = lrn,
    .lrn_backward = lrn_backward,
    .max_pool = max_pool,
    .max_pool_backward = max_pool_backward,
    .lrn_max_pool = lrn_max_pool,
    .lrn_max_pool_backward = lrn_max_pool_backward,
    .fingerprint = fingerprint,
    .augment = augment,
    .conv = conv_kernels,
};

}  // namespace fastalex::cpu::FASTALEX_ISA
