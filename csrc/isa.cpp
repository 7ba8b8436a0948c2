#include "isa.h"

#include <cstring>

namespace fastpeft {
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

int isa() { return used(); }

const char* isa_name() { return kNames[used()]; }

bool isa_use(const char* name) {
  for (int k = 1; k <= level(); ++k) {
    if (std::strcmp(name, kNames[k]) == 0) {
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
