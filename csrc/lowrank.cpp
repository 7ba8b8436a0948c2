// Which build of the low-rank products this processor runs.
#include "lowrank.h"

#include "isa.h"

namespace fastpeft {

#ifdef FASTPEFT_X86
namespace avx2 {
LowRank functions();
}
namespace avx512 {
LowRank functions();
}
#endif

LowRank lowrank_cpu() {
#ifdef FASTPEFT_X86
  return isa() == 2 ? avx512::functions() : isa() == 1 ? avx2::functions() : LowRank{};
#else
  return LowRank{};
#endif
}

}  // namespace fastpeft
