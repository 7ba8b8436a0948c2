// Part of body.h: columns of a matrix as rows of fp32, a block of tokens at a time, and back.
#pragma once

#include <cstring>
#include <utility>

#include "../floats.h"
#include "../lowrank_vec.h"
#include "sparse.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

typedef int32_t IVec __attribute__((vector_size(4 * FASTPEFT_LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * FASTPEFT_LANES)));
typedef uint16_t HVec __attribute__((vector_size(2 * FASTPEFT_LANES)));
typedef uint16_t HVecU __attribute__((vector_size(2 * FASTPEFT_LANES), aligned(2), may_alias));

inline UVec bits_of(Vec v) { return reinterpret_cast<UVec>(v); }
inline Vec float_of(UVec v) { return reinterpret_cast<Vec>(v); }
inline UVec pick(IVec take, UVec a, UVec b) {
  const UVec mask = reinterpret_cast<UVec>(take);
  return (mask & a) | (~mask & b);
}

// kLanes numbers as fp32: load() of floats.h, on vectors
inline Vec fetch(const float* p) { return get(p); }
inline UVec widened(const void* p) {
  return __builtin_convertvector(static_cast<HVec>(*static_cast<const HVecU*>(p)), UVec);
}
inline Vec fetch(const BFloat16* p) { return float_of(widened(p) << 16); }
inline Vec fetch(const Float16* p) {
  const UVec all = widened(p), u = all & 0x7FFFu;
  const UVec small = bits_of(__builtin_convertvector(reinterpret_cast<IVec>(u), Vec) * 0x1p-24f);
  const UVec normal = (u << 13) + (112u << 23), special = (u << 13) | 0x7F800000u;
  return float_of(pick(u < 0x400u, small, pick(u < 0x7C00u, normal, special)) | ((all & 0x8000u) << 16));
}

// and rounded to the type of p: store() of floats.h, on vectors
inline void round_to(float* p, Vec v) { put(p, v); }
inline void narrowed(void* p, UVec v) { *static_cast<HVecU*>(p) = __builtin_convertvector(v, HVec); }
inline void round_to(BFloat16* p, Vec v) {
  const UVec u = bits_of(v), rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  narrowed(p, pick((u & 0x7FFFFFFFu) > 0x7F800000u, UVec{} + 0x7FC0u, rounded));
}
inline void round_to(Float16* p, Vec v) {
  const UVec sign = (bits_of(v) >> 16) & 0x8000u, u = bits_of(v) & 0x7FFFFFFFu;
  const UVec small = bits_of(float_of(u) + 0.5f) - 0x3F000000u;  // the bits of 0.5
  const UVec normal = (u - (112u << 23) + 0xFFFu + ((u >> 13) & 1u)) >> 13;
  const UVec special = pick(u > 0x7F800000u, UVec{} + 0x7E00u, UVec{} + 0x7C00u);
  narrowed(p, pick(u < 0x38800000u, small, pick(u < 0x47800000u, normal, special)) | sign);
}

constexpr int from_first(int d, int j) { return j & d ? kLanes + j - d : j; }
constexpr int from_second(int d, int j) { return j & d ? kLanes + j : j + d; }

// two rows of blocks of d x d numbers: the upper right block and the lower left one change places
template <int D, int... J>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
  const Vec first = FASTPEFT_SHUFFLE(a, b, from_first(D, J)...);
  b = FASTPEFT_SHUFFLE(a, b, from_second(D, J)...);
  a = first;
}

template <int D>
inline void exchange(Vec* v) {
  for (int i = 0; i < kLanes; ++i) {
    if ((i & D) == 0) exchange<D>(v[i], v[i + D], std::make_integer_sequence<int, kLanes>());
  }
}

// kLanes x kLanes numbers, transposed in place
inline void transpose(Vec* v) {
  exchange<1>(v);
  exchange<2>(v);
  exchange<4>(v);
#if FASTPEFT_LANES == 16
  exchange<8>(v);
#endif
}

inline int64_t groups_of(int64_t cols) { return (cols + kLanes - 1) / kLanes; }
inline int64_t rounded_up(int64_t n) { return groups_of(n) * kLanes; }

inline float* aligned(float* p) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }
constexpr int64_t kAlign = 16;  // numbers that aligned() may skip

// Columns in groups of kLanes, of which those used are wanted; `to` and `sums` hold column first * kLanes + c at c * ld.
struct Groups {
  int64_t first, end;
  const uint8_t* used;
};

// to[c, i] = m[row + i, c], i < n, zero from there to a full vector; columns beyond the last of m are zero
template <typename T>
void columns_of(const T* m, int64_t stride, int64_t cols, int64_t n, const Groups& s, float* to, int64_t ld) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int rows = static_cast<int>(least(kLanes, n - i));
    for (int64_t g = s.first; g < s.end; ++g) {
      if (s.used[g] == 0) continue;
      const int64_t width = least(kLanes, cols - g * kLanes);
      const T* from = m + i * stride + g * kLanes;
      Vec v[kLanes];
      for (int q = 0; q < kLanes; ++q) {
        if (q >= rows) {
          v[q] = Vec{};
        } else if (width == kLanes) {
          v[q] = fetch(from + q * stride);
        } else {
          T row[kLanes] = {};
          std::memcpy(row, from + q * stride, static_cast<size_t>(width) * sizeof(T));
          v[q] = fetch(row);
        }
      }
      transpose(v);
      float* column = to + (g - s.first) * kLanes * ld + i;
      for (int q = 0; q < kLanes; ++q) put(column + q * ld, v[q]);
    }
  }
}

void columns_of(const Matrix& m, int64_t row, int64_t cols, int64_t n, const Groups& s, float* to, int64_t ld) {
  const int64_t at = row * m.stride;
  switch (m.dtype) {
    case 1: columns_of(static_cast<const float*>(m.data) + at, m.stride, cols, n, s, to, ld); break;
    case 2: columns_of(static_cast<const BFloat16*>(m.data) + at, m.stride, cols, n, s, to, ld); break;
    default: columns_of(static_cast<const Float16*>(m.data) + at, m.stride, cols, n, s, to, ld);
  }
}

// m[row + i, c] += sums[c, i], rounded once
template <typename T>
void add_columns(T* m, int64_t stride, int64_t cols, int64_t n, const Groups& s, const float* sums, int64_t ld) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int rows = static_cast<int>(least(kLanes, n - i));
    for (int64_t g = s.first; g < s.end; ++g) {
      if (s.used[g] == 0) continue;
      const int64_t width = least(kLanes, cols - g * kLanes);
      const float* column = sums + (g - s.first) * kLanes * ld + i;
      Vec v[kLanes];
      for (int q = 0; q < kLanes; ++q) v[q] = get(column + q * ld);
      transpose(v);
      T* to = m + i * stride + g * kLanes;
      for (int q = 0; q < rows; ++q, to += stride) {
        if (width == kLanes) {
          round_to(to, fetch(to) + v[q]);
        } else {
          T row[kLanes] = {};
          std::memcpy(row, to, static_cast<size_t>(width) * sizeof(T));
          round_to(row, fetch(row) + v[q]);
          std::memcpy(to, row, static_cast<size_t>(width) * sizeof(T));
        }
      }
    }
  }
}

void add_columns(const Matrix& m, int64_t row, int64_t cols, int64_t n, const Groups& s, const float* sums, int64_t ld) {
  const int64_t at = row * m.stride;
  switch (m.dtype) {
    case 1: add_columns(static_cast<float*>(m.data) + at, m.stride, cols, n, s, sums, ld); break;
    case 2: add_columns(static_cast<BFloat16*>(m.data) + at, m.stride, cols, n, s, sums, ld); break;
    default: add_columns(static_cast<Float16*>(m.data) + at, m.stride, cols, n, s, sums, ld);
  }
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
