// Part of lowrank_body.h: rows of 16-bit numbers, dropout, and factors of any layout.
#pragma once

#include <cstring>
#include "dropout_cpu.h"
#include "floats.h"
#include "lowrank.h"
#include "lowrank_vec.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

template <typename T>
inline void widen(const T* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = load(x[i]);
}

inline void widen(const Matrix& m, int64_t row, int64_t first, float* out, int64_t n) {
  const int64_t at = row * m.stride + first;
  switch (m.dtype) {
    case 1: std::memcpy(out, static_cast<const float*>(m.data) + at, static_cast<size_t>(n) * 4); break;
    case 2: widen(static_cast<const BFloat16*>(m.data) + at, out, n); break;
    default: widen(static_cast<const Float16*>(m.data) + at, out, n);
  }
}

template <typename T>
inline void narrow(const float* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(out + i, x[i]);
}

inline void narrow(const Matrix& m, int64_t row, int64_t first, const float* x, int64_t n) {
  const int64_t at = row * m.stride + first;
  switch (m.dtype) {
    case 1: std::memcpy(static_cast<float*>(m.data) + at, x, static_cast<size_t>(n) * 4); break;
    case 2: narrow(x, static_cast<BFloat16*>(m.data) + at, n); break;
    default: narrow(x, static_cast<Float16*>(m.data) + at, n);
  }
}

// x *= mask, for columns first .. first + n - 1 of a row; first is a multiple of 8
inline void drop(const Mask& mask, int64_t row, int64_t first, float* x, int64_t n) {
  constexpr int64_t kBlock = 512;
  alignas(64) uint16_t draws[kBlock];
  const uint32_t threshold = mask.threshold;
  const float factor = mask.factor;  // a copy: x might be it, for all the compiler knows
  for (int64_t from = 0; from < n; from += kBlock) {
    const int m = static_cast<int>(least(kBlock, n - from));
    dropout_draws(mask.seed, static_cast<uint32_t>((first + from) / 8), (m + 7) / 8, static_cast<uint32_t>(row), draws);
    for (int i = 0; i < m; ++i) x[from + i] *= draws[i] >= threshold ? factor : 0.0f;
  }
}

bool packed(const Factor& f, int64_t r, int64_t c) {
  return f.sc == 1 && f.sr == c && f.sn == r * c && f.scale == 1.0f && f.gain == nullptr;
}

// [n, r, c], contiguous, constants folded in: `room` or the factor itself
const float* pack(const Factor& f, int64_t n, int64_t r, int64_t c, float* room) {
  if (f.data == nullptr || packed(f, r, c)) return f.data;
  for (int64_t b = 0; b < n; ++b) {
    for (int64_t j = 0; j < r; ++j) {
      const float* from = f.data + b * f.sn + j * f.sr;
      float* to = room + (b * r + j) * c;
      for (int64_t k = 0; k < c; ++k) to[k] = from[k * f.sc] * f.scale;
      for (int64_t k = 0; k < c && f.gain != nullptr; ++k) to[k] *= f.gain[b * c + k];
    }
  }
  return room;
}

int64_t room_for(const Factor& f, int64_t n, int64_t r, int64_t c) {
  return f.data == nullptr || packed(f, r, c) ? 0 : n * r * c;
}

// the reverse: from [n, r, c] to the factor's own layout
void unpack(const float* from, const Factor& f, int64_t n, int64_t r, int64_t c) {
  for (int64_t b = 0; b < n; ++b) {
    for (int64_t j = 0; j < r; ++j, from += c) {
      float* to = f.data + b * f.sn + j * f.sr;
      const float* gain = f.gain == nullptr ? nullptr : f.gain + b * c;
      for (int64_t k = 0; k < c; ++k) to[k * f.sc] = from[k] * (gain == nullptr ? f.scale : f.scale * gain[k]);
    }
  }
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
