// Part of lowrank_body.h: the norms of the rows of W + B A.
#pragma once

#include "lowrank_parts.h"
#include "lowrank_rows.h"
#include "lowrank_tiles.h"
#include "parallel.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

struct NormJob {
  const NormArgs& a;
  int parts;
};

void norm_part(void* context, int part) {
  const NormJob& job = *static_cast<const NormJob*>(context);
  const NormArgs& a = job.a;
  const Space space((kRows + 1) * kColumns + kRows * a.r);
  float *lines = space.data, *line = lines + kRows * kColumns, *us = line + kColumns;
  const Range rows = range_of(a.o, job.parts, part);
  for (int64_t i = rows.begin; i < rows.end; i += kRows) {
    const int64_t m = least(kRows, rows.end - i);
    float total[kRows] = {};
    for (int64_t q = 0; q < m * a.r; ++q) us[q] = a.scale * a.b[i * a.r + q];
    for (int64_t k = 0; k < a.c; k += kColumns) {
      const int64_t n = least(kColumns, a.c - k);
      spread_of_rows<false>(us, a.r, a.a + k, a.c, a.r, m, n, lines, kColumns);
      for (int64_t q = 0; q < m; ++q) {
        const float *w = line, *added = lines + q * kColumns;
        if (a.w.dtype == 1) {
          w = static_cast<const float*>(a.w.data) + (i + q) * a.w.stride + k;
        } else {
          widen(a.w, i + q, k, line, n);
        }
        Vec sum = {};
        int64_t s = 0;
        for (; s + kLanes <= n; s += kLanes) {
          const Vec v = get(w + s) + get(added + s);
          sum += v * v;
        }
        float rest = 0.0f;
        for (; s < n; ++s) rest += (w[s] + added[s]) * (w[s] + added[s]);
        total[q] += total_of(sum) + rest;
      }
    }
    for (int64_t q = 0; q < m; ++q) {
      if (a.out != nullptr) {
        a.out[i + q] = total[q];
        continue;
      }
      a.inverse[i + q] = total[q] == 0.0f ? 0.0f : 1.0f / __builtin_sqrtf(total[q]);
      a.rest[i + q] = total[q] == 0.0f ? 1.0f : 0.0f;
    }
  }
}

void norm(const NormArgs& a) {
  NormJob job{a, parts_for(a.o, a.c, a.threads)};
  parallel(job.parts, norm_part, &job);
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
