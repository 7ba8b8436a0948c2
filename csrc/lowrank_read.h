// Part of lowrank_body.h: one pass over x: u, G and dgain.
#pragma once

#include "lowrank_parts.h"
#include "lowrank_rows.h"
#include "lowrank_tiles.h"
#include "parallel.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

struct ReadJob {
  const ReadArgs& a;
  int parts;
  const float* f;
  const BFloat16* half;  // f in bfloat16, if the products are
  bool bf16;
  float* g;  // one after another, of all parts
  double* dgain;
};

// dgain += sum over t rows of x * z. It is a small difference of large sums where a magnitude has settled: double, and four
// rows at a time, because an addition costs more than a product here
void add_products(const Matrix& m, int64_t begin, int64_t t, const float* x, int64_t ldx, int64_t cols, float* zs, double* dgain) {
  for (int64_t i = 0; i < t; i += 4) {
    const int rows = static_cast<int>(least(4, t - i));
    const float *z[4], *y[4];
    for (int q = 0; q < 4; ++q) {
      const int64_t row = i + (q < rows ? q : 0);
      y[q] = x + row * ldx;
      z[q] = zs + q * cols;
      if (m.dtype == 1) {
        z[q] = static_cast<const float*>(m.data) + (begin + row) * m.stride;
      } else if (q < rows) {
        widen(m, begin + row, 0, zs + q * cols, cols);
      }
    }
    if (rows == 4) {
      for (int64_t k = 0; k < cols; ++k) {
        dgain[k] += (y[0][k] * z[0][k] + y[1][k] * z[1][k]) + (y[2][k] * z[2][k] + y[3][k] * z[3][k]);
      }
    } else {
      for (int q = 0; q < rows; ++q) {
        for (int64_t k = 0; k < cols; ++k) dgain[k] += y[q][k] * z[q][k];
      }
    }
  }
}

// Whether the products are formed of x and w as they are, in bfloat16; the factor is then rounded to it, as a vendor's product
// would have it.
bool in_bf16(const ReadArgs& a) {
#if FASTPEFT_LANES == 16
  return a.x.dtype == 2 && (a.w.data == nullptr || a.w.dtype == 2) && !a.mask.on && a.c % 32 == 0 && bf16_products();
#else
  (void)a;
  return false;
#endif
}

#if FASTPEFT_LANES == 16
void read_bf16(const ReadArgs& a, const BFloat16* factor, int64_t begin, int64_t t, float* us, float* ws, float* rows, float* g, double* dgain) {
  const int64_t ranks = a.n * a.r, cols = a.n * a.c, ldx = a.x.stride;
  const BFloat16* x = static_cast<const BFloat16*>(a.x.data) + begin * ldx;
  for (int64_t b = 0; b < a.n && factor != nullptr; ++b) {
    const BFloat16* f = factor + b * a.r * a.c;
    int64_t i = 0;
    for (; i + 4 <= t; i += 4) dots_of_rank_bf16<4>(x + i * ldx + b * a.c, ldx, f, a.c, a.r, us + i * ranks + b * a.r, ranks);
    for (; i < t; ++i) dots_of_rank_bf16<1>(x + i * ldx + b * a.c, ldx, f, a.c, a.r, us + i * ranks + b * a.r, ranks);
  }
  for (int64_t i = 0; i < t && factor != nullptr; ++i) narrow(a.u, begin + i, 0, us + i * ranks, ranks);
  if (g != nullptr) {
    const BFloat16* w = static_cast<const BFloat16*>(a.w.data) + begin * a.w.stride;
    uint32_t* wp = reinterpret_cast<uint32_t*>(ws);
    for (int64_t i = 0; i < t; i += 2) {
      for (int64_t j = 0; j < ranks; ++j) {
        const uint32_t second = i + 1 < t ? w[(i + 1) * a.w.stride + j].bits : 0u;
        wp[i / 2 * ranks + j] = w[i * a.w.stride + j].bits | second << 16;
      }
    }
    for (int64_t b = 0; b < a.n; ++b) outer_of_bf16(x + b * a.c, ldx, wp + b * a.r, ranks, t, a.c, a.r, g + b * a.r * a.c);
  }
  for (int64_t i = 0; i < t && dgain != nullptr; i += 4) {
    const int64_t m = least(4, t - i);
    for (int64_t q = 0; q < m; ++q) widen(a.x, begin + i + q, 0, rows + (4 + q) * cols, cols);
    add_products(a.z, begin + i, m, rows + 4 * cols, cols, cols, rows, dgain);
  }
}
#endif

void read_block(const ReadArgs& a, const float* factor, int64_t begin, int64_t t, float* stage, float* us, float* ws, float* zs, float* g, double* dgain) {
  const int64_t cols = a.n * a.c, ranks = a.n * a.r;
  const float* x = stage;
  int64_t ldx = cols;
  if (a.x.dtype == 1 && !a.mask.on) {
    x = static_cast<const float*>(a.x.data) + begin * a.x.stride;
    ldx = a.x.stride;
  } else {
    for (int64_t i = 0; i < t; ++i) {
      widen(a.x, begin + i, 0, stage + i * cols, cols);
      if (a.mask.on) drop(a.mask, begin + i, 0, stage + i * cols, cols);
    }
  }
  if (factor != nullptr) {
    for (int64_t b = 0; b < a.n; ++b) {
      const float* f = factor + b * a.r * a.c;
      int64_t i = 0;
      for (; i + 4 <= t; i += 4) dots_of_rank<4>(x + i * ldx + b * a.c, ldx, f, a.c, a.r, us + i * ranks + b * a.r, ranks);
      for (; i < t; ++i) dots_of_rank<1>(x + i * ldx + b * a.c, ldx, f, a.c, a.r, us + i * ranks + b * a.r, ranks);
    }
    for (int64_t i = 0; i < t; ++i) narrow(a.u, begin + i, 0, us + i * ranks, ranks);
  }
  if (g != nullptr) {
    for (int64_t i = 0; i < t; ++i) widen(a.w, begin + i, 0, ws + i * ranks, ranks);
    for (int64_t b = 0; b < a.n; ++b) {
      outer_of_block(x + b * a.c, ldx, ws + b * a.r, ranks, t, a.c, a.r, g + b * a.r * a.c);
    }
  }
  if (dgain != nullptr) add_products(a.z, begin, t, x, ldx, cols, zs, dgain);
}

void read_part(void* context, int part) {
  ReadJob& job = *static_cast<ReadJob*>(context);
  const ReadArgs& a = job.a;
  const int64_t cols = a.n * a.c, ranks = a.n * a.r, size = a.n * a.r * a.c;
  const int64_t wide = job.bf16 ? 2 : 4;  // bytes of a number of x while it is read
  const int64_t block = least(64, most(8, kCache / (wide * most(1, cols)) / 4 * 4));
  const Space space(block * (cols + 2 * ranks) + 4 * cols);  // a block has eight rows or more, which read_bf16 counts on
  float *stage = space.data, *us = stage + block * cols, *ws = us + block * ranks, *zs = ws + block * ranks;
  float* g = a.g.data == nullptr ? nullptr : job.g + part * size;
  double* dgain = a.dgain == nullptr ? nullptr : job.dgain + part * cols;
  if (g != nullptr) std::memset(g, 0, static_cast<size_t>(size) * 4);
  if (dgain != nullptr) std::memset(dgain, 0, static_cast<size_t>(cols) * 8);
  const Range rows = range_of(a.t, job.parts, part);
#if FASTPEFT_LANES == 16
  for (int64_t i = rows.begin; i < rows.end && job.bf16; i += block) {
    read_bf16(a, job.half, i, least(block, rows.end - i), us, ws, stage, g, dgain);
  }
  if (job.bf16) return;
#endif
  for (int64_t i = rows.begin; i < rows.end; i += block) {
    read_block(a, job.f, i, least(block, rows.end - i), stage, us, ws, zs, g, dgain);
  }
}

// the first part += the others, in their order: the same bits on every run with as many threads
template <typename T>
void join(T* parts, int count, int64_t size) {
  for (int part = 1; part < count; ++part) {
    for (int64_t k = 0; k < size; ++k) parts[k] += parts[part * size + k];
  }
}

void read(const ReadArgs& a) {
  const int64_t cols = a.n * a.c, size = a.n * a.r * a.c;
  const int parts = parts_for(a.t, cols, a.threads);
  const Space f(room_for(a.f, a.n, a.r, a.c)), g(a.g.data == nullptr ? 0 : parts * size);
  const Space room(a.dgain == nullptr ? 0 : 2 * parts * cols);
  double* dgain = reinterpret_cast<double*>(room.data);
  const float* factor = pack(a.f, a.n, a.r, a.c, f.data);
  const bool bf16 = in_bf16(a);
  const Space half(bf16 && factor != nullptr ? (size + 1) / 2 : 0);
  BFloat16* rounded = bf16 && factor != nullptr ? reinterpret_cast<BFloat16*>(half.data) : nullptr;
  if (rounded != nullptr) narrow(factor, rounded, size);
  ReadJob job{a, parts, factor, rounded, bf16, g.data, dgain};
  parallel(parts, read_part, &job);
  if (a.g.data != nullptr) {
    join(g.data, parts, size);
    unpack(g.data, a.g, a.n, a.r, a.c);
  }
  if (a.dgain != nullptr) {
    join(dgain, parts, cols);
    for (int64_t k = 0; k < cols; ++k) a.dgain[k] = static_cast<float>(dgain[k]);
  }
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
