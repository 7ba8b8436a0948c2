// Which build of the sparse products this processor runs.
#include "sparse.h"

#include "../isa.h"

namespace fastpeft {

#ifdef FASTPEFT_X86
namespace avx2 {
Sparse sparse_functions();
}
namespace avx512 {
Sparse sparse_functions();
}
#endif

Sparse sparse_cpu() {
#ifdef FASTPEFT_X86
  return isa() == 2 ? avx512::sparse_functions() : isa() == 1 ? avx2::sparse_functions() : Sparse{};
#else
  return Sparse{};
#endif
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
