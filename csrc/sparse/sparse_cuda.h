// Entries of a matrix [rows, cols] on CUDA: plain C launchers, bound by module.cpp where nvcc was found.
//
// index int32 [2, nnz] on the device, rows then columns, in row-major order without repetition and within the matrix: that is
// not checked here, it would have to wait for the device. Strides are of rows, in numbers; columns have stride one.
// dtypes: 1 float32, 2 bfloat16, 3 float16. All return a cudaError_t, or -1 for another dtype.
#pragma once

#include <cstdint>

extern "C" {

// to [cols, ld] = x [tokens, cols] transposed, in x's dtype, zero from `tokens` to ld; ld is a multiple of 8
int fastpeft_sparse_columns_cuda(void* to, int64_t ld, const void* x, int64_t stride, int dtype, int64_t tokens, int64_t cols,
                                 void* stream);

// out[k] = sum over t of dz[row_k, t] * x[col_k, t] in fp32; dz [rows, ld] and x [cols, ld] as the function above leaves them,
// at addresses that are multiples of 16. The order of the sum depends on ld alone.
int fastpeft_sparse_grad_cuda(float* out, const void* dz, const void* x, int64_t ld, int dtype, const int32_t* index, int64_t nnz,
                              void* stream);

// out[k] = or (add) += chunk[row_k - row0, col_k] for k in begin .. end - 1; chunk holds the rows from row0 on
int fastpeft_sparse_gather_cuda(float* out, const void* chunk, int64_t stride, int dtype, int64_t row0, const int32_t* index,
                                int64_t nnz, int64_t begin, int64_t end, bool add, void* stream);

// out = w, out[row_k, col_k] = w[row_k, col_k] + values[k], rounded once
int fastpeft_sparse_copy_cuda(void* out, int64_t out_stride, const void* w, int64_t stride, int dtype, int64_t rows, int64_t cols,
                              const int32_t* index, const float* values, int64_t nnz, void* stream);

// saved[k] = w[row_k, col_k], then w[row_k, col_k] += values[k], rounded once
int fastpeft_sparse_put_cuda(void* w, int64_t stride, int dtype, const int32_t* index, const float* values, void* saved,
                             int64_t nnz, void* stream);

// w[row_k, col_k] = saved[k], bit for bit
int fastpeft_sparse_restore_cuda(void* w, int64_t stride, int dtype, const int32_t* index, const void* saved, int64_t nnz,
                                 void* stream);
}
