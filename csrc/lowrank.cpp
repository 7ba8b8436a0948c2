// Which build of the low-rank products this processor runs.
#include "lowrank.h"

#include <cstring>

namespace fastpeft {

#ifdef FASTPEFT_X86
namespace avx2 {
LowRank functions();
}
namespace avx512 {
LowRank functions();
}
#endif

namespace {

int level() {
#ifdef FASTPEFT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return 2;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const char* const kNames[] = {"none", "avx2", "avx512"};

int& used() {
  static int found = level();
  return found;
}

}  // namespace

LowRank lowrank_cpu() {
#ifdef FASTPEFT_X86
  return used() == 2 ? avx512::functions() : used() == 1 ? avx2::functions() : LowRank{};
#else
  return LowRank{};
#endif
}

const char* lowrank_isa() { return kNames[used()]; }

bool lowrank_use(const char* isa) {
  for (int k = 1; k <= level(); ++k) {
    if (std::strcmp(isa, kNames[k]) == 0) {
      used() = k;
      return true;
    }
  }
  return false;
}

bool bf16_products() {
#ifdef FASTPEFT_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace fastpeft
