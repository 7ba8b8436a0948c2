// Entries of a matrix [rows, cols] on the CPU: their gradient, the weight with them in it, and the product with them alone.
//
//   grad     out[k] = sum over t of dz[t, row_k] * x[t, col_k]           out [nnz] fp32, x [t, cols], dz [t, rows]
//   add      y[t, row_k] += values[k] * x[t, col_k]                      y [t, rows], x [t, cols]
//   add_t    y[t, col_k] += values[k] * x[t, row_k]                      y [t, cols], x [t, rows]
//   copy     out = W, out[row_k, col_k] = W[row_k, col_k] + values[k]    W, out [rows, cols]
//   put      saved[k] = W[row_k, col_k], then W[row_k, col_k] += values[k]
//   restore  W[row_k, col_k] = saved[k], bit for bit
//
// A Matrix has rows of any stride and columns of stride one. Products and sums are formed in fp32 and rounded to the result's
// dtype once. The same bits come from any number of threads. dtypes: 1 float32, 2 bfloat16, 3 float16.
// Every function returns false, and does nothing, for an index that entries_fit refuses.
#pragma once

#include <cstdint>

#include "../lowrank.h"  // Matrix

namespace fastpeft {

// index [2, nnz], rows then columns, strictly increasing in row-major order
struct Entries {
  const int32_t* index;
  int64_t nnz, rows, cols;
};

struct SparseGradArgs {
  Matrix dz, x;
  int64_t t;
  Entries e;
  float* out;
  int threads;
};

// y must not overlap x
struct SparseAddArgs {
  Matrix y, x;
  int64_t t;
  Entries e;
  const float* values;
  bool transposed;
  int threads;
};

struct Sparse {
  void (*grad)(const SparseGradArgs&);
  void (*add)(const SparseAddArgs&);
};

// The functions for this processor; null members where none was built for it (they need AVX2 and FMA at least).
Sparse sparse_cpu();

// Whether every entry lies within [rows, cols] and comes after the one before it.
bool entries_fit(const Entries& e);
bool sparse_grad(const SparseGradArgs& a);
bool sparse_add(const SparseAddArgs& a);
// W and out have one dtype; they may be one matrix
bool sparse_copy(const Matrix& w, const Matrix& out, const Entries& e, const float* values, int threads);
bool sparse_put(const Matrix& w, const Entries& e, const float* values, void* saved, int threads);
bool sparse_restore(const Matrix& w, const Entries& e, const void* saved, int threads);

}  // namespace fastpeft
