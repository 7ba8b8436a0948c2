#pragma once

#include <cstdint>

namespace fastpeft {

// Strides in numbers, not bytes. An element is kept iff its draw >= threshold, and multiplied by factor.
struct DropoutArgs {
  void* out;
  int64_t out_stride0, out_stride1;
  const void* x;
  int64_t x_stride0, x_stride1;
  uint64_t seed;
  int64_t row0, rows, cols;
  uint32_t threshold;
  double factor;
  int threads;
};

// out = x * mask, or out += x * mask. dtypes: 0 float64, 1 float32, 2 bfloat16, 3 float16; false for any other
bool dropout_cpu(const DropoutArgs& args, int out_dtype, int x_dtype, bool add);

}  // namespace fastpeft
