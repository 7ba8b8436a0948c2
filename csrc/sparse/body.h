// The body of sparse_<isa>.cpp: one source, compiled once per instruction set. As in lowrank_body.h, nothing here may be
// emitted as a symbol that another object also defines; tests/test_sparse_cpu.py looks at the objects.
#pragma once

#include "add.h"
#include "grad.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

Sparse sparse_functions() { return {grad, add}; }

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
