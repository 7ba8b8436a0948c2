// The low-rank products beside a base product on the CPU: what is as thin as the rank on one side.
//
//   shrink   u = (mask * x) F^T                      down: F = A      du: F = s B^T
//   outer    G = s * w^T (mask * x)                  dA: w = du       dB^T: w = v     dgain = sum over tokens of x * z
//   expand   z (+)= mask * (u F) + bias              up: F = s B^T    dx: F = A       and y = gain * z + bias
//   norm     ||W + B A||^2 of each row
//
// n blocks of c columns and rank r. x, z [t, n * c] and u, w [t, n * r] have rows of any stride and columns of stride one;
// F and G are [n, r, c], fp32. Products and sums are formed in fp32; results are rounded once to their dtype.
// dtypes: 1 float32, 2 bfloat16, 3 float16.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastpeft {

struct Matrix {
  void* data;
  int64_t stride;  // of rows, in numbers
  int dtype;
};

struct Mask {
  bool on;
  uint64_t seed;
  uint32_t threshold;
  float factor;
};

// Factors of any layout, in fp32: entry [n, r, c] lies at n * sn + r * sr + c * sc, and stands for scale * gain[c] times what
// is stored there (gain of all n * c columns, or null). Read, they are packed first; written, gain and scale come last.
struct Factor {
  float* data;
  int64_t sn, sr, sc;
  float scale;
  const float* gain;
};

// f and u, w and g, z and dgain come together or are null
struct ReadArgs {
  Matrix x;
  int64_t t, n, c, r;
  Mask mask;
  Factor f;
  Matrix u;
  Matrix w;
  Factor g;
  Matrix z;
  float* dgain;
  int threads;
};

// fresh: z = ..., else z += ...; y != null: y = gain * z + bias, else bias is added to z. f.data == null: only that y, of z as it is
struct WriteArgs {
  Matrix z;
  int64_t t, n, c, r;
  Mask mask;
  Factor f;
  Matrix u;
  bool fresh;
  const float* bias;
  const float* gain;
  Matrix y;
  int threads;
};

// out = ||W + scale B A||^2, or, without out, inverse = 1 / ||W + scale B A|| and rest = 0; where that norm is zero, 0 and 1
struct NormArgs {
  Matrix w;  // [o, c]
  int64_t o, c, r;
  const float* a;  // [r, c]
  const float* b;  // [o, r]
  float scale;
  float *out, *inverse, *rest;
  int threads;
};

// One term on a small layer, all of it, in fp32 and contiguous: x [t, i], w [o, i], a [r, i], b [o, r], y [t, o].
// kept: u [t, r], and with a gain z [t, o], the gain [o] and what the given one was multiplied by [o].
struct SmallForward {
  const float *x, *w, *a, *b, *bias, *gain;
  float *y, *kept;
  int64_t t, i, o, r;
  float scale;
  bool over;  // the gain is divided by the norms of the rows of w + scale b a
};

// null: not wanted
struct SmallBackward {
  const float *x, *w, *a, *b, *kept, *dy;
  float *dx, *da, *db, *dbias, *dgain;
  int64_t t, i, o, r;
  float scale;
  bool has_gain;
};

struct LowRank {
  void (*read)(const ReadArgs&);
  void (*write)(const WriteArgs&);
  void (*norm)(const NormArgs&);
  void (*small_forward)(const SmallForward&);
  void (*small_backward)(const SmallBackward&);
};

// The functions for this processor; null members where none was built for it (they need AVX2 and FMA at least).
LowRank lowrank_cpu();

}  // namespace fastpeft
