#pragma once

#include <cstdint>

namespace fastpeft {

// Strides in numbers, not bytes. add: out += x * mask, else out = x * mask.
struct DropoutCudaArgs {
  int64_t out_stride0, out_stride1, x_stride0, x_stride1;
  uint64_t seed;
  int64_t row0, rows, cols;
  uint32_t threshold;
  double factor;
  bool add;
};

}  // namespace fastpeft

// out and x share one dtype: 0 float64, 1 float32, 2 bfloat16, 3 float16. Returns a cudaError_t, or -1 for another dtype.
extern "C" int fastpeft_dropout_cuda(void* out, const void* x, int dtype, const fastpeft::DropoutCudaArgs* args,
                                     void* stream);
