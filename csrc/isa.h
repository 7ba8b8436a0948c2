// Which instruction set the compiled products use: one for all families.
#pragma once

namespace fastpeft {

// 0: none that something was built for (AVX2 and FMA at least are needed), 1: AVX2, 2: AVX-512
int isa();
const char* isa_name();
// Take another one from now on, for tests; false, and nothing changes, if this processor does not have it.
bool isa_use(const char* name);
// Whether this processor multiplies bfloat16 itself: then a vendor's bfloat16 product does twice the work per instruction.
bool bf16_products();

}  // namespace fastpeft
