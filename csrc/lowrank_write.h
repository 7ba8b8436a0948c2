// Part of lowrank_body.h: one pass over z, and over y where there is a gain.
#pragma once

#include "lowrank_parts.h"
#include "lowrank_rows.h"
#include "lowrank_tiles.h"
#include "parallel.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

struct WriteJob {
  const WriteArgs& a;
  int parts;
  const float* f;
  const uint32_t* pairs;  // f in bfloat16, if the products are
};

// y = gain * line + bias in columns first .. first + n - 1 of one row; `other` is room for as many
inline void scale_row(const WriteArgs& a, int64_t row, int64_t first, const float* line, float* other, int64_t n) {
  const float *bias = a.bias == nullptr ? nullptr : a.bias + first, *gain = a.gain + first;
  float* y = a.y.dtype == 1 ? static_cast<float*>(a.y.data) + row * a.y.stride + first : other;
  if (bias != nullptr) {
    for (int64_t k = 0; k < n; ++k) y[k] = gain[k] * line[k] + bias[k];
  } else {
    for (int64_t k = 0; k < n; ++k) y[k] = gain[k] * line[k];
  }
  if (y == other) narrow(a.y, row, first, other, n);
}

// columns first .. first + n - 1 of one row, whose products are in `line`; `other` is room for as many
inline void finish_row(const WriteArgs& a, int64_t row, int64_t first, float* line, float* other, int64_t n) {
  const float* bias = a.bias == nullptr ? nullptr : a.bias + first;
  const bool in_place = a.z.dtype == 1 && line == static_cast<float*>(a.z.data) + row * a.z.stride + first;
  if (!a.fresh && !in_place) {
    widen(a.z, row, first, other, n);
    for (int64_t k = 0; k < n; ++k) line[k] += other[k];
  }
  if (a.y.data == nullptr && bias != nullptr) {
    for (int64_t k = 0; k < n; ++k) line[k] += bias[k];
  }
  if (!in_place) narrow(a.z, row, first, line, n);
  if (a.y.data != nullptr) scale_row(a, row, first, line, other, n);
}

// y = gain * z + bias of t rows from `row` on, z as it is
void scale_rows(const WriteArgs& a, int64_t row, int64_t t, float* line, float* other) {
  const int64_t cols = a.n * a.c;
  for (int64_t i = row; i < row + t; ++i) {
    for (int64_t k = 0; k < cols; k += kColumns) {
      const int64_t n = least(kColumns, cols - k);
      const float* z = line;
      if (a.z.dtype == 1) {
        z = static_cast<const float*>(a.z.data) + i * a.z.stride + k;
      } else {
        widen(a.z, i, k, line, n);
      }
      scale_row(a, i, k, z, other, n);
    }
  }
}

#if FASTPEFT_LANES == 16
// spread for bfloat16 u and f, and what follows it, straight from the registers. up [rows, pairs], fp [pairs, c]: two ranks side
// by side. Pointers to the first row's first column; bias, gain and y may be null.
struct Finish {
  BFloat16* z;
  int64_t z_stride;
  BFloat16* y;
  int64_t y_stride;
  const float *bias, *gain;
  bool fresh;
};

template <int M, int V>
FASTPEFT_BF16 void spread_of_bf16(const uint32_t* up, int64_t ldu, const uint32_t* fp, int64_t ldf, int64_t pairs, const Finish& to, int64_t k) {
  __m512 acc[M][V];
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < V; ++v) acc[i][v] = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < pairs; ++j) {
    __m512bh b[V];
    for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(fp + j * ldf + k + 16 * v);
    for (int i = 0; i < M; ++i) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int>(up[i * ldu + j]));
      for (int v = 0; v < V; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], b[v], a);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = k + 16 * v;
      BFloat16* z = to.z + i * to.z_stride + at;
      __m512 value = acc[i][v];
      if (!to.fresh) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(z)));
        value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
      }
      if (to.y == nullptr && to.bias != nullptr) value = _mm512_add_ps(value, _mm512_loadu_ps(to.bias + at));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(z), (__m256i)_mm512_cvtneps_pbh(value));
      if (to.y == nullptr) continue;
      value = _mm512_mul_ps(value, _mm512_loadu_ps(to.gain + at));
      if (to.bias != nullptr) value = _mm512_add_ps(value, _mm512_loadu_ps(to.bias + at));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.y + i * to.y_stride + at), (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
}

template <int M>
void spread_row_bf16(const uint32_t* up, int64_t ldu, const uint32_t* fp, int64_t ldf, int64_t pairs, const Finish& to, int64_t k, int64_t end) {
  for (; k + 64 <= end; k += 64) spread_of_bf16<M, 4>(up, ldu, fp, ldf, pairs, to, k);
  for (; k < end; k += 16) spread_of_bf16<M, 1>(up, ldu, fp, ldf, pairs, to, k);
}

// u [r] of one token -> its pairs; an odd last one is paired with zero
void pair_up(const BFloat16* u, int64_t r, uint32_t* out) {
  for (int64_t j = 0; j < r; j += 2) out[j / 2] = u[j].bits | (j + 1 < r ? static_cast<uint32_t>(u[j + 1].bits) << 16 : 0u);
}

void write_rows_bf16(const WriteArgs& a, const uint32_t* fp, int64_t row, int64_t t, uint32_t* up) {
  const int64_t pairs = (a.r + 1) / 2, ldu = a.n * pairs;
  for (int64_t i = 0; i < t; ++i) {
    const BFloat16* u = static_cast<const BFloat16*>(a.u.data) + (row + i) * a.u.stride;
    for (int64_t b = 0; b < a.n; ++b) pair_up(u + b * a.r, a.r, up + i * ldu + b * pairs);
  }
  for (int64_t b = 0; b < a.n; ++b) {
    const int64_t first = b * a.c;
    for (int64_t k = 0; k < a.c; k += kColumns) {
      const int64_t end = least(a.c, k + kColumns);
      for (int64_t i = 0; i < t;) {
        Finish to{static_cast<BFloat16*>(a.z.data) + (row + i) * a.z.stride + first, a.z.stride, nullptr, a.y.stride,
                  a.bias == nullptr ? nullptr : a.bias + first, a.gain == nullptr ? nullptr : a.gain + first, a.fresh};
        if (a.y.data != nullptr) to.y = static_cast<BFloat16*>(a.y.data) + (row + i) * a.y.stride + first;
        const uint32_t *u = up + i * ldu + b * pairs, *f = fp + b * pairs * a.c;
        if (i + 4 <= t) {
          spread_row_bf16<4>(u, ldu, f, a.c, pairs, to, k, end);
          i += 4;
        } else {
          spread_row_bf16<1>(u, ldu, f, a.c, pairs, to, k, end);
          i += 1;
        }
      }
    }
  }
}
#endif

bool writes_bf16(const WriteArgs& a) {
#if FASTPEFT_LANES == 16
  return a.f.data != nullptr && a.z.dtype == 2 && !a.mask.on && a.c % 16 == 0 && bf16_products();
#else
  (void)a;
  return false;
#endif
}

// [n, r, c] in fp32 -> pairs of ranks [n, (r + 1) / 2, c] in bfloat16
void pair_ranks(const float* f, int64_t n, int64_t r, int64_t c, uint32_t* out) {
  for (int64_t b = 0; b < n; ++b) {
    for (int64_t j = 0; j < r; j += 2, out += c) {
      const float *one = f + (b * r + j) * c, *two = one + c;
      for (int64_t k = 0; k < c; ++k) {
        BFloat16 low, high{0};
        store(&low, one[k]);
        if (j + 1 < r) store(&high, two[k]);
        out[k] = low.bits | static_cast<uint32_t>(high.bits) << 16;
      }
    }
  }
}

// t rows from `row` on; fp32 without a mask needs no room beside z itself
void write_rows(const WriteArgs& a, const float* factor, int64_t row, int64_t t, const float* us, float* lines, float* other) {
  const int64_t ranks = a.n * a.r;
  for (int64_t b = 0; b < a.n; ++b) {
    for (int64_t k = 0; k < a.c; k += kColumns) {
      const int64_t n = least(kColumns, a.c - k), first = b * a.c + k;
      const float *u = us + b * a.r, *f = factor + b * a.r * a.c + k;
      float* out = lines;
      int64_t ldo = kColumns;
      if (a.z.dtype == 1) {
        ldo = a.z.stride;
        out = static_cast<float*>(a.z.data) + row * ldo + first;
      }
      if (a.z.dtype == 1 && !a.fresh) {
        spread_of_rows<true>(u, ranks, f, a.c, a.r, t, n, out, ldo);
      } else {
        spread_of_rows<false>(u, ranks, f, a.c, a.r, t, n, out, ldo);
      }
      if (a.z.dtype == 1 && a.bias == nullptr && a.y.data == nullptr) continue;
      for (int64_t i = 0; i < t; ++i) finish_row(a, row + i, first, out + i * ldo, other, n);
    }
  }
}

// with a mask: whole rows, since its words belong to columns of the matrix and not of a block
void write_masked_rows(const WriteArgs& a, const float* factor, int64_t row, int64_t t, const float* us, float* lines, float* other) {
  const int64_t cols = a.n * a.c;
  for (int64_t b = 0; b < a.n; ++b) {
    const float* f = factor + b * a.r * a.c;
    spread_of_rows<false>(us + b * a.r, a.n * a.r, f, a.c, a.r, t, a.c, lines + b * a.c, cols);
  }
  for (int64_t i = 0; i < t; ++i) {
    drop(a.mask, row + i, 0, lines + i * cols, cols);
    finish_row(a, row + i, 0, lines + i * cols, other, cols);
  }
}

void write_part(void* context, int part) {
  const WriteJob& job = *static_cast<const WriteJob*>(context);
  const WriteArgs& a = job.a;
  const int64_t ranks = a.n * a.r, height = a.mask.on ? 4 : kRows, width = a.mask.on ? a.n * a.c : kColumns;
  const Space space(height * ranks + (height + 1) * width);
  float *us = space.data, *lines = us + height * ranks, *other = lines + height * width;
  const Range rows = range_of(a.t, job.parts, part);
  for (int64_t i = rows.begin; i < rows.end; i += height) {
    const int64_t t = least(height, rows.end - i);
#if FASTPEFT_LANES == 16
    if (job.pairs != nullptr) {
      write_rows_bf16(a, job.pairs, i, t, reinterpret_cast<uint32_t*>(us));
      continue;
    }
#endif
    if (job.f == nullptr) {
      scale_rows(a, i, t, lines, other);
      continue;
    }
    for (int64_t k = 0; k < t; ++k) widen(a.u, i + k, 0, us + k * ranks, ranks);
    (a.mask.on ? write_masked_rows : write_rows)(a, job.f, i, t, us, lines, other);
  }
}

void write(const WriteArgs& a) {
  const Space f(room_for(a.f, a.n, a.r, a.c));
  const float* factor = pack(a.f, a.n, a.r, a.c, f.data);
  const bool bf16 = writes_bf16(a);
  const Space room(bf16 ? a.n * ((a.r + 1) / 2) * a.c : 0);
  uint32_t* pairs = bf16 ? reinterpret_cast<uint32_t*>(room.data) : nullptr;
  if (bf16) pair_ranks(factor, a.n, a.r, a.c, pairs);
  WriteJob job{a, parts_for(a.t, a.n * a.c, a.threads), factor, pairs};
  parallel(job.parts, write_part, &job);
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
