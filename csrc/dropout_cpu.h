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

// The draws of `groups` groups of eight columns from group g0 on, of one row; room for a multiple of 128 numbers in `out`.
void dropout_draws(uint64_t seed, uint32_t g0, int groups, uint32_t row, uint16_t* out);

// out = x * mask, or out += x * mask. dtypes: 0 float64, 1 float32, 2 bfloat16, 3 float16; false for any other
bool dropout_cpu(const DropoutArgs& args, int out_dtype, int x_dtype, bool add);

}  // namespace fastpeft
