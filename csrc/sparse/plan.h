// Part of body.h: how the work is cut. Nothing but the shape and the index decides it, so that no sum depends on the threads.
#pragma once

#include "../parallel.h"
#include "columns.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

// Rows of the entries are handled a panel of four groups at a time: a cache line of a 16-bit row is read once.
constexpr int64_t kPanel = 4 * kLanes;

inline int64_t panels_of(int64_t rows) { return (rows + kPanel - 1) / kPanel; }

// Tokens at a time: their columns in fp32 fill half of a cache of 1 MiB, and there are blocks for a few threads.
int64_t block_of(int64_t t, int64_t cols) {
  const int64_t fit = least(least(256, (1 << 17) / most(1, cols)), (t + 15) / 16);
  return least(rounded_up(t), most(64, fit / kLanes * kLanes));
}

// from one column to the next: a multiple of a cache line that is no power of two
inline int64_t stride_of(int64_t block) { return block + 16; }

// Which entries are in which panel, and which groups of rows and columns occur. Lives in the memory of `room`.
struct Plan {
  const int32_t *row, *col;
  int64_t *start;  // of each panel's entries; one more than there are panels
  uint8_t *rows, *cols;

  static int64_t room(const Entries& e) { return 2 * (panels_of(e.rows) + 1) + (groups_of(e.rows) + groups_of(e.cols)) / 4 + 2; }

  Plan(const Entries& e, float* room) {
    row = e.index;
    col = row + e.nnz;
    start = reinterpret_cast<int64_t*>(room);
    rows = reinterpret_cast<uint8_t*>(start + panels_of(e.rows) + 1);
    cols = rows + groups_of(e.rows);
    std::memset(rows, 0, static_cast<size_t>(groups_of(e.rows) + groups_of(e.cols)));
    int64_t panel = 0;
    for (int64_t k = 0; k < e.nnz; ++k) {
      for (; panel * kPanel <= row[k]; ++panel) start[panel] = k;
      rows[row[k] / kLanes] = 1;
      cols[col[k] / kLanes] = 1;
    }
    for (; panel <= panels_of(e.rows); ++panel) start[panel] = e.nnz;
  }

  Groups panel(int64_t p, const Entries& e) const { return {p * kPanel / kLanes, least((p + 1) * kPanel / kLanes, groups_of(e.rows)), rows}; }
  Groups all_cols(const Entries& e) const { return {0, groups_of(e.cols), cols}; }
};

// body(context, k) for k = 0 .. count - 1 on at most `threads` threads
struct Items {
  void (*body)(const void* context, int64_t item);
  const void* context;
  int64_t count, next;
};

void take_items(void* pointer, int) {
  Items& items = *static_cast<Items*>(pointer);
  for (;;) {
    const int64_t k = __atomic_fetch_add(&items.next, 1, __ATOMIC_RELAXED);
    if (k >= items.count) return;
    items.body(items.context, k);
  }
}

void for_items(int64_t count, int64_t threads, void (*body)(const void*, int64_t), const void* context) {
  Items items{body, context, count, 0};
  parallel(static_cast<int>(most(1, least(threads, count))), take_items, &items);
}

// waking the others takes as long as this many products
inline int64_t threads_for(int64_t work, int threads) { return work < (1 << 18) ? 1 : threads; }

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
