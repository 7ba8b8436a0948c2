// Part of lowrank_body.h: a small layer, whole.
#pragma once

#include "lowrank_norm.h"
#include "lowrank_tiles.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

// out [t, r] = x [t, c] f^T, f [r, c]
void dots_of_rows(const float* x, const float* f, int64_t t, int64_t c, int64_t r, float* out) {
  int64_t i = 0;
  for (; i + 4 <= t; i += 4) dots_of_rank<4>(x + i * c, c, f, c, r, out + i * r, r);
  for (; i < t; ++i) dots_of_rank<1>(x + i * c, c, f, c, r, out + i * r, r);
}

// to [c, r] = scale * from [r, c]^T
void transpose(const float* from, int64_t r, int64_t c, float scale, float* to) {
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t k = 0; k < c; ++k) to[k * r + j] = scale * from[j * c + k];
  }
}

void small_forward(const SmallForward& a) {
  float* u = a.kept;
  float* z = a.gain == nullptr ? a.y : u + a.t * a.r;
  const Space bt(a.o * a.r);
  transpose(a.b, a.o, a.r, a.scale, bt.data);
  dots_of_rows(a.x, a.w, a.t, a.i, a.o, z);
  dots_of_rows(a.x, a.a, a.t, a.i, a.r, u);
  spread_of_rows<true>(u, a.r, bt.data, a.o, a.r, a.t, a.o, z, a.o);
  if (a.gain == nullptr) {
    for (int64_t i = 0; i < a.t && a.bias != nullptr; ++i) {
      for (int64_t k = 0; k < a.o; ++k) a.y[i * a.o + k] += a.bias[k];
    }
    return;
  }
  float *gain = z + a.t * a.o, *inverse = gain + a.o;
  if (a.over) {
    norm({{const_cast<float*>(a.w), a.i, 1}, a.o, a.i, a.r, a.a, a.b, a.scale, nullptr, inverse, gain, 1});
    for (int64_t k = 0; k < a.o; ++k) gain[k] += a.gain[k] * inverse[k];
  } else {
    for (int64_t k = 0; k < a.o; ++k) gain[k] = a.gain[k], inverse[k] = 1.0f;
  }
  for (int64_t i = 0; i < a.t; ++i) {
    const float* from = z + i * a.o;
    float* to = a.y + i * a.o;
    for (int64_t k = 0; k < a.o; ++k) to[k] = gain[k] * from[k] + (a.bias == nullptr ? 0.0f : a.bias[k]);
  }
}

void small_backward(const SmallBackward& a) {
  const float *u = a.kept, *z = u + a.t * a.r, *gain = z + a.t * a.o, *inverse = gain + a.o;
  const Space space(a.t * a.o + a.t * a.r + 2 * a.o * a.r);
  float *scaled = space.data, *du = scaled + a.t * a.o, *bt = du + a.t * a.r, *dbt = bt + a.o * a.r;
  const float* dz = a.dy;
  if (a.has_gain) {
    for (int64_t i = 0; i < a.t; ++i) {
      for (int64_t k = 0; k < a.o; ++k) scaled[i * a.o + k] = gain[k] * a.dy[i * a.o + k];
    }
    dz = scaled;
  }
  if (a.dgain != nullptr) {
    for (int64_t k = 0; k < a.o; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < a.t; ++i) sum += static_cast<double>(a.dy[i * a.o + k]) * z[i * a.o + k];
      a.dgain[k] = static_cast<float>(sum * inverse[k]);
    }
  }
  if (a.dbias != nullptr) {
    for (int64_t k = 0; k < a.o; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < a.t; ++i) sum += a.dy[i * a.o + k];
      a.dbias[k] = static_cast<float>(sum);
    }
  }
  if (a.dx != nullptr || a.da != nullptr) {
    transpose(a.b, a.o, a.r, a.scale, bt);
    dots_of_rows(dz, bt, a.t, a.o, a.r, du);
  }
  if (a.dx != nullptr) {
    spread_of_rows<false>(dz, a.o, a.w, a.i, a.o, a.t, a.i, a.dx, a.i);
    spread_of_rows<true>(du, a.r, a.a, a.i, a.r, a.t, a.i, a.dx, a.i);
  }
  if (a.da != nullptr) {
    std::memset(a.da, 0, static_cast<size_t>(a.r * a.i) * 4);
    outer_of_block(a.x, a.i, du, a.r, a.t, a.i, a.r, a.da);
  }
  if (a.db != nullptr) {
    std::memset(dbt, 0, static_cast<size_t>(a.r * a.o) * 4);
    outer_of_block(dz, a.o, u, a.r, a.t, a.o, a.r, dbt);
    transpose(dbt, a.r, a.o, a.scale, a.db);
  }
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
