// Part of body.h: the product of x with the entries alone, added to y. Sums are formed in columns of a block of tokens, in
// fp32, and added to y's rows at the end.
#pragma once

#include "plan.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

struct AddJob {
  const SparseAddArgs& a;
  const Entries& e;
  const float* values;
  const Plan& plan;
  int64_t block;
};

// Entries in a piece of a sum: one by one, a long sum would be rounded as often as it has entries, and come out worse than a
// product of dense matrices.
constexpr int64_t kRun = 32;

// out[i] = sum over k = begin .. end - 1 of values[k] * column col[k] of x, V vectors
template <int V>
inline void combine(const int32_t* col, const float* values, int64_t begin, int64_t end, const float* x, int64_t ld, float* out) {
  Vec total[V];
  for (int q = 0; q < V; ++q) total[q] = splat(-0.0f);
  for (int64_t k = begin; k < end;) {
    Vec s[V] = {};
    for (const int64_t stop = least(end, k + kRun); k < stop; ++k) {
      const float* from = x + col[k] * ld;
      const Vec v = splat(values[k]);
      for (int q = 0; q < V; ++q) s[q] += v * get(from + q * kLanes);
    }
    for (int q = 0; q < V; ++q) total[q] += s[q];
  }
  for (int q = 0; q < V; ++q) put(out + q * kLanes, total[q]);
}

void add_block(const void* context, int64_t item) {
  const AddJob& job = *static_cast<const AddJob*>(context);
  const Entries& e = job.e;
  const Plan& plan = job.plan;
  const int64_t ld = stride_of(job.block), begin = item * job.block, count = least(job.block, job.a.t - begin), n = rounded_up(count);
  const Space space(kAlign + (rounded_up(e.cols) + kPanel) * ld);
  float *x = aligned(space.data), *panel = x + rounded_up(e.cols) * ld;
  columns_of(job.a.x, begin, e.cols, count, plan.all_cols(e), x, ld);
  for (int64_t p = 0; p < panels_of(e.rows); ++p) {
    const Groups rows = plan.panel(p, e);
    int64_t k = plan.start[p];
    if (k == plan.start[p + 1]) continue;
    // a row without entries gets -0, which leaves every number as it is; +0 would not
    for (int64_t r = p * kPanel; r < rows.end * kLanes; ++r) {
      int64_t end = k;
      while (end < plan.start[p + 1] && plan.row[end] == r) ++end;
      float* out = panel + (r - p * kPanel) * ld;
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes) combine<4>(plan.col, job.values, k, end, x + i, ld, out + i);
      for (; i < n; i += kLanes) combine<1>(plan.col, job.values, k, end, x + i, ld, out + i);
      k = end;
    }
    add_columns(job.a.y, begin, e.rows, count, rows, panel, ld);
  }
}

// The entries of the transposed matrix: sorted by column, in the order of the rows within each. room holds 2 nnz numbers, moved
// nnz, next one more than there are columns.
Entries transposed(const Entries& e, const float* values, float* room, int64_t* next, float* moved) {
  int32_t* index = reinterpret_cast<int32_t*>(room);
  std::memset(next, 0, static_cast<size_t>(e.cols + 1) * 8);
  for (int64_t k = 0; k < e.nnz; ++k) ++next[e.index[e.nnz + k] + 1];
  for (int64_t c = 0; c < e.cols; ++c) next[c + 1] += next[c];
  for (int64_t k = 0; k < e.nnz; ++k) {
    const int32_t col = e.index[e.nnz + k];
    const int64_t to = next[col]++;
    index[to] = col;
    index[e.nnz + to] = e.index[k];
    moved[to] = values[k];
  }
  return {index, e.nnz, e.cols, e.rows};
}

void add(const SparseAddArgs& a) {
  const int64_t nnz = a.e.nnz;
  if (nnz == 0 || a.t == 0) return;
  const Space turned(a.transposed ? 3 * nnz + 2 : 0), counts(a.transposed ? 2 * (a.e.cols + 1) : 0);
  float* moved = turned.data + 2 * nnz;
  const Entries e = a.transposed ? transposed(a.e, a.values, turned.data, reinterpret_cast<int64_t*>(counts.data), moved) : a.e;
  const Space room(Plan::room(e));
  const Plan plan(e, room.data);
  const AddJob job{a, e, a.transposed ? moved : a.values, plan, block_of(a.t, e.cols)};
  for_items((a.t + job.block - 1) / job.block, threads_for(a.t * (nnz + e.rows + e.cols), a.threads), add_block, &job);
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
