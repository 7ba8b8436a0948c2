// Which build of the sparse products this processor runs.
#include "sparse.h"

#include <cstring>

namespace fastpeft {

#ifdef FASTPEFT_X86
namespace avx2 {
Sparse sparse_functions();
}
namespace avx512 {
Sparse sparse_functions();
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

Sparse sparse_cpu() {
#ifdef FASTPEFT_X86
  return used() == 2 ? avx512::sparse_functions() : used() == 1 ? avx2::sparse_functions() : Sparse{};
#else
  return Sparse{};
#endif
}

const char* sparse_isa() { return kNames[used()]; }

bool sparse_use(const char* isa) {
  for (int k = 1; k <= level(); ++k) {
    if (std::strcmp(isa, kNames[k]) == 0) {
      used() = k;
      return true;
    }
  }
  return false;
}

bool sparse_grad(const SparseGradArgs& a) {
  if (!entries_fit(a.e)) return false;
  sparse_cpu().grad(a);
  return true;
}

bool sparse_add(const SparseAddArgs& a) {
  if (!entries_fit(a.e)) return false;
  sparse_cpu().add(a);
  return true;
}

}  // namespace fastpeft
