// Entries of a weight: checked, added in a copy, put and restored. Nothing here depends on the instruction set.
#include <algorithm>
#include <cstring>

#include "../floats.h"
#include "../parallel.h"
#include "sparse.h"

namespace fastpeft {
namespace {

constexpr int64_t kPiece = 1 << 15;  // entries of one piece of work
constexpr int64_t kBytes = 1 << 18;  // of W that are copied before the entries among them are changed: they fit the cache

struct Work {
  const Matrix& w;
  const Matrix& out;
  const Entries& e;
  const float* values;
  void* saved;
  int64_t rows;  // of one piece
};

int64_t pieces_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

int64_t size_of(int dtype) { return dtype == 1 ? 4 : 2; }

// parts is what work there is; more threads than that are not asked for
void share(int64_t pieces, int threads, void (*body)(void*, int), Work& work) {
  struct Shared {
    void (*body)(void*, int);
    Work& work;
    int64_t pieces, parts;
  };
  Shared shared{body, work, pieces, std::min<int64_t>(pieces, std::max(1, threads))};
  parallel(
      static_cast<int>(shared.parts),
      [](void* pointer, int part) {
        const Shared& s = *static_cast<Shared*>(pointer);
        for (int64_t k = part; k < s.pieces; k += s.parts) s.body(&s.work, static_cast<int>(k));
      },
      &shared);
}

template <typename T>
void put_piece(void* context, int piece) {
  const Work& work = *static_cast<Work*>(context);
  const int32_t *row = work.e.index, *col = row + work.e.nnz;
  T *w = static_cast<T*>(work.w.data), *saved = static_cast<T*>(work.saved);
  const int64_t end = std::min(work.e.nnz, (piece + 1) * kPiece);
  for (int64_t k = piece * kPiece; k < end; ++k) {
    T* at = w + row[k] * work.w.stride + col[k];
    saved[k] = *at;
    store(at, load(saved[k]) + work.values[k]);
  }
}

// numbers of as many bits: their bits are what counts
template <typename T>
void restore_piece(void* context, int piece) {
  const Work& work = *static_cast<Work*>(context);
  const int32_t *row = work.e.index, *col = row + work.e.nnz;
  T* w = static_cast<T*>(work.w.data);
  const T* saved = static_cast<const T*>(work.saved);
  const int64_t end = std::min(work.e.nnz, (piece + 1) * kPiece);
  for (int64_t k = piece * kPiece; k < end; ++k) w[row[k] * work.w.stride + col[k]] = saved[k];
}

template <typename T>
void copy_piece(void* context, int piece) {
  const Work& work = *static_cast<Work*>(context);
  const Entries& e = work.e;
  const int32_t *row = e.index, *col = row + e.nnz;
  const T* w = static_cast<const T*>(work.w.data);
  T* out = static_cast<T*>(work.out.data);
  const int64_t begin = piece * work.rows, end = std::min(e.rows, begin + work.rows);
  if (out == w) {  // the entries alone
  } else if (work.w.stride == e.cols && work.out.stride == e.cols) {
    std::memcpy(out + begin * e.cols, w + begin * e.cols, static_cast<size_t>((end - begin) * e.cols) * sizeof(T));
  } else {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(out + i * work.out.stride, w + i * work.w.stride, static_cast<size_t>(e.cols) * sizeof(T));
    }
  }
  for (int64_t k = std::lower_bound(row, col, begin) - row; k < e.nnz && row[k] < end; ++k) {
    store(out + row[k] * work.out.stride + col[k], load(w[row[k] * work.w.stride + col[k]]) + work.values[k]);
  }
}

}  // namespace

bool entries_fit(const Entries& e) {
  const int32_t *row = e.index, *col = row + e.nnz;
  unsigned bad = 0;
  for (int64_t k = 0; k < e.nnz; ++k) {
    bad |= static_cast<unsigned>(row[k] < 0) | static_cast<unsigned>(row[k] >= e.rows);
    bad |= static_cast<unsigned>(col[k] < 0) | static_cast<unsigned>(col[k] >= e.cols);
  }
  for (int64_t k = 1; k < e.nnz; ++k) {
    bad |= static_cast<unsigned>(row[k] < row[k - 1]);
    bad |= static_cast<unsigned>(row[k] == row[k - 1]) & static_cast<unsigned>(col[k] <= col[k - 1]);
  }
  return bad == 0;
}

bool sparse_copy(const Matrix& w, const Matrix& out, const Entries& e, const float* values, int threads) {
  if (!entries_fit(e)) return false;
  if (e.rows == 0 || e.cols == 0) return true;
  Work work{w, out, e, values, nullptr, std::max<int64_t>(1, kBytes / (e.cols * size_of(w.dtype)))};
  const auto body = w.dtype == 1 ? copy_piece<float> : w.dtype == 2 ? copy_piece<BFloat16> : copy_piece<Float16>;
  share(pieces_of(e.rows, work.rows), threads, body, work);
  return true;
}

bool sparse_put(const Matrix& w, const Entries& e, const float* values, void* saved, int threads) {
  if (!entries_fit(e)) return false;
  Work work{w, w, e, values, saved, 0};
  const auto body = w.dtype == 1 ? put_piece<float> : w.dtype == 2 ? put_piece<BFloat16> : put_piece<Float16>;
  share(pieces_of(e.nnz, kPiece), threads, body, work);
  return true;
}

bool sparse_restore(const Matrix& w, const Entries& e, const void* saved, int threads) {
  if (!entries_fit(e)) return false;
  Work work{w, w, e, nullptr, const_cast<void*>(saved), 0};
  share(pieces_of(e.nnz, kPiece), threads, w.dtype == 1 ? restore_piece<uint32_t> : restore_piece<uint16_t>, work);
  return true;
}

}  // namespace fastpeft
