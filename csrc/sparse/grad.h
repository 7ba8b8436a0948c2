// Part of body.h: the gradient of the entries. For a block of tokens, columns of x and dz become rows; an entry's share is then
// the dot product of two of them, kLanes tokens an instruction, and the lanes of kLanes entries are added up together.
#pragma once

#include "plan.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

// Sums over parts of the tokens, joined in their order; ranges of panels are independent of one another.
struct GradJob {
  const SparseGradArgs& a;
  const Plan& plan;
  int64_t block, token_parts, entry_parts;
  float* sums;  // [token_parts, nnz]; with one part the result itself
};

// v[q] = lanes of the dot product of x[q] and z[q], n numbers, a multiple of kLanes
inline void dots(const float* const* x, const float* const* z, int64_t n, Vec* v) {
  Vec s0{}, s1{}, s2{}, s3{};
  for (int64_t i = 0; i < n; i += kLanes) {
    s0 += get(x[0] + i) * get(z[0] + i);
    s1 += get(x[1] + i) * get(z[1] + i);
    s2 += get(x[2] + i) * get(z[2] + i);
    s3 += get(x[3] + i) * get(z[3] + i);
  }
  v[0] = s0;
  v[1] = s1;
  v[2] = s2;
  v[3] = s3;
}

// out[k] += the dot product of entry k's columns, k = begin .. end - 1; z holds the columns from row0 on
void add_dots(const Plan& plan, int64_t begin, int64_t end, int64_t row0, const float* x, const float* z, int64_t ld, int64_t n, float* out) {
  for (int64_t k = begin; k < end; k += kLanes) {
    const int count = static_cast<int>(least(kLanes, end - k));
    Vec v[kLanes];
    for (int q = 0; q < kLanes; q += 4) {
      if (q >= count) {
        for (int i = q; i < q + 4; ++i) v[i] = Vec{};
        continue;
      }
      const float *xs[4], *zs[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t at = k + least(q + i, count - 1);
        xs[i] = x + plan.col[at] * ld;
        zs[i] = z + (plan.row[at] - row0) * ld;
      }
      dots(xs, zs, n, v + q);
    }
    const Vec total = sums(v);
    if (count == kLanes) {
      put(out + k, get(out + k) + total);
    } else {
      float lanes[kLanes];
      put(lanes, total);
      for (int q = 0; q < count; ++q) out[k + q] += lanes[q];
    }
  }
}

// the first panel whose entries begin no earlier than a share `part` of `parts`
int64_t panel_at(const Plan& plan, const Entries& e, int64_t part, int64_t parts) {
  const int64_t panels = panels_of(e.rows);
  if (part == parts) return panels;
  int64_t p = 0;
  while (p < panels && plan.start[p] < e.nnz * part / parts) ++p;
  return p;
}

void grad_item(const void* context, int64_t item) {
  const GradJob& job = *static_cast<const GradJob*>(context);
  const SparseGradArgs& a = job.a;
  const Plan& plan = job.plan;
  const int64_t part = item % job.token_parts, share = item / job.token_parts;
  const int64_t first = panel_at(plan, a.e, share, job.entry_parts), last = panel_at(plan, a.e, share + 1, job.entry_parts);
  if (plan.start[first] == plan.start[last]) return;
  float* out = job.sums + part * a.e.nnz;
  std::memset(out + plan.start[first], 0, static_cast<size_t>(plan.start[last] - plan.start[first]) * 4);
  const int64_t ld = stride_of(job.block);
  const Space space(kAlign + (rounded_up(a.e.cols) + kPanel) * ld);
  float *x = aligned(space.data), *z = x + rounded_up(a.e.cols) * ld;
  const int64_t blocks = (a.t + job.block - 1) / job.block;
  for (int64_t b = blocks * part / job.token_parts; b < blocks * (part + 1) / job.token_parts; ++b) {
    const int64_t begin = b * job.block, n = least(job.block, a.t - begin);
    columns_of(a.x, begin, a.e.cols, n, plan.all_cols(a.e), x, ld);
    for (int64_t p = first; p < last; ++p) {
      if (plan.start[p] == plan.start[p + 1]) continue;
      columns_of(a.dz, begin, a.e.rows, n, plan.panel(p, a.e), z, ld);
      add_dots(plan, plan.start[p], plan.start[p + 1], p * kPanel, x, z, ld, rounded_up(n), out);
    }
  }
}

constexpr int64_t kJoin = 1 << 14;  // entries at a time

void join_item(const void* context, int64_t item) {
  const GradJob& job = *static_cast<const GradJob*>(context);
  const int64_t nnz = job.a.e.nnz, begin = item * kJoin, n = least(kJoin, nnz - begin);
  float* out = job.a.out + begin;
  std::memcpy(out, job.sums + begin, static_cast<size_t>(n) * 4);
  for (int64_t part = 1; part < job.token_parts; ++part) {
    const float* more = job.sums + part * nnz + begin;
    for (int64_t k = 0; k < n; ++k) out[k] += more[k];
  }
}

void grad(const SparseGradArgs& a) {
  const int64_t nnz = a.e.nnz;
  if (nnz == 0) return;
  const int64_t block = block_of(a.t, a.e.cols), blocks = block == 0 ? 1 : (a.t + block - 1) / block;
  // many entries: shares of them, each of which reads x anew, rather than a sum for each part of the tokens
  const int64_t entry_parts = most(1, least(32, nnz >> 17));
  const int64_t token_parts = least(blocks, most(1, least(32, (1 << 21) / nnz)));
  const Space room(Plan::room(a.e)), sums(token_parts == 1 ? 0 : token_parts * nnz);
  const Plan plan(a.e, room.data);
  const GradJob job{a, plan, most(kLanes, block), token_parts, entry_parts, token_parts == 1 ? a.out : sums.data};
  const int64_t threads = threads_for(a.t * (nnz + a.e.rows + a.e.cols), a.threads);
  for_items(token_parts * entry_parts, threads, grad_item, &job);
  if (token_parts > 1) for_items((nnz + kJoin - 1) / kJoin, threads, join_item, &job);
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
