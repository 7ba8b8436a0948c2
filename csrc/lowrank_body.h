// The body of lowrank_<isa>.cpp: one source, compiled once per instruction set into a namespace of its own.
//
// Nothing here may be emitted as a symbol that another object also defines (a template of the standard library, an inline
// function of a header): the linker keeps one of them, and a processor without AVX-512 could end up in the copy that has it.
// So everything is static, in the unnamed namespace or always inlined; tests/test_lowrank_cpu.py looks at the objects.
#pragma once

#include "lowrank.h"
#include "lowrank_norm.h"
#include "lowrank_read.h"
#include "lowrank_small.h"
#include "lowrank_write.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

LowRank functions() { return {read, write, norm, small_forward, small_backward}; }

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
