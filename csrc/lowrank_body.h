// The body of lowrank_<isa>.cpp: one source, compiled once per instruction set into a namespace of its own.
//
// Nothing here may be emitted as a symbol that another object also defines (a template of the standard library, an inline
// function of a header): the linker keeps one of them, and a processor without AVX-512 could end up in the copy that has it.
// So everything is static, in the unnamed namespace or always inlined; tests/test_extension.py looks at the objects.
#include <cstdlib>
#include <cstring>
#if FASTPEFT_LANES == 16
#include <immintrin.h>
#endif

#include "dropout_cpu.h"
#include "floats.h"
#include "lowrank.h"
#include "parallel.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

constexpr int kLanes = FASTPEFT_LANES;
constexpr int kWide = kLanes == 16 ? 4 : 2;  // tiles of 4 x kWide vectors: as many sums as there are registers for
typedef float Vec __attribute__((vector_size(4 * FASTPEFT_LANES)));
typedef float VecU __attribute__((vector_size(4 * FASTPEFT_LANES), aligned(4), may_alias));

inline Vec get(const float* p) { return *reinterpret_cast<const VecU*>(p); }
inline void put(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
inline Vec splat(float v) { return v - Vec{}; }

#if defined(__clang__)
#define FASTPEFT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int Index __attribute__((vector_size(4 * FASTPEFT_LANES)));
#define FASTPEFT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

// sums of neighbours: of a in the lower half, of b in the upper
inline Vec pairs(Vec a, Vec b) {
#if FASTPEFT_LANES == 16
  return FASTPEFT_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         FASTPEFT_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  return FASTPEFT_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + FASTPEFT_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// out[k] = the sum of v[k]'s lanes, for kLanes vectors
inline Vec sums(Vec* v) {
  for (int n = kLanes; n > 1; n /= 2) {
    for (int k = 0; k < n / 2; ++k) v[k] = pairs(v[2 * k], v[2 * k + 1]);
  }
  return v[0];
}

// in pairs: lane after lane would round as often as there are lanes
inline float total_of(Vec v) {
  float lanes[kLanes];
  put(lanes, v);
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int k = 0; k < n; ++k) lanes[k] += lanes[k + n];
  }
  return lanes[0];
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Room for `numbers` floats until the end of the scope, of unknown content. Each thread keeps what it once had, in the order
// of nesting: memory of this size would otherwise be mapped, faulted in and unmapped again in every call.
struct Pool {
  float* data[8];
  int64_t size[8];
  int depth;
};
thread_local Pool pool;

struct Space {
  float* data;
  explicit Space(int64_t numbers) {
    const int k = pool.depth++;
    if (k >= 8) std::abort();
    if (pool.size[k] < numbers || pool.data[k] == nullptr) {
      std::free(pool.data[k]);
      pool.size[k] = most(1, numbers);
      pool.data[k] = static_cast<float*>(std::malloc(static_cast<size_t>(pool.size[k]) * 4));
      if (pool.data[k] == nullptr) std::abort();  // a thread of OpenMP's cannot throw
    }
    data = pool.data[k];
  }
  ~Space() { --pool.depth; }
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;
};

// ---- rows of 16-bit numbers, and dropout

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

// ---- tiles

// out[i * ldo + j] = sum over c of x[i, c] f[j, c], for M rows and N ranks
template <int M, int N>
inline void dots(const float* x, int64_t ldx, const float* f, int64_t ldf, int64_t c, float* out, int64_t ldo) {
  Vec acc[16] = {};
  int64_t k = 0;
  for (; k + kLanes <= c; k += kLanes) {
    Vec b[N];
    for (int j = 0; j < N; ++j) b[j] = get(f + j * ldf + k);
    for (int i = 0; i < M; ++i) {
      const Vec a = get(x + i * ldx + k);
      for (int j = 0; j < N; ++j) acc[4 * i + j] += a * b[j];
    }
  }
  float total[16];
  for (int h = 0; h < 16; h += kLanes) put(total + h, sums(acc + h));
  for (; k < c; ++k) {
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) total[4 * i + j] += x[i * ldx + k] * f[j * ldf + k];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) out[i * ldo + j] = total[4 * i + j];
  }
}

template <int M>
inline void dots_of_rank(const float* x, int64_t ldx, const float* f, int64_t c, int64_t r, float* out, int64_t ldo) {
  int64_t j = 0;
  for (; j + kWide <= r; j += kWide) dots<M, kWide>(x, ldx, f + j * c, c, c, out + j, ldo);
  for (; j + 2 <= r; j += 2) dots<M, 2>(x, ldx, f + j * c, c, c, out + j, ldo);
  for (; j < r; ++j) dots<M, 1>(x, ldx, f + j * c, c, c, out + j, ldo);
}

// g[j, c] += sum over t rows of w[t, j] x[t, c], for N ranks and V vectors of columns
template <int N, int V>
inline void outer(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t t, float* g, int64_t ldg) {
  Vec acc[N][V] = {};
  for (int64_t i = 0; i < t; ++i) {
    Vec a[V];
    for (int v = 0; v < V; ++v) a[v] = get(x + i * ldx + v * kLanes);
    for (int j = 0; j < N; ++j) {
      const Vec b = splat(w[i * ldw + j]);
      for (int v = 0; v < V; ++v) acc[j][v] += a[v] * b;
    }
  }
  for (int j = 0; j < N; ++j) {
    for (int v = 0; v < V; ++v) put(g + j * ldg + v * kLanes, get(g + j * ldg + v * kLanes) + acc[j][v]);
  }
}

template <int V>
inline void outer_of_rank(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t t, int64_t r, float* g, int64_t ldg) {
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) outer<4, V>(x, ldx, w + j, ldw, t, g + j * ldg, ldg);
  for (; j < r; ++j) outer<1, V>(x, ldx, w + j, ldw, t, g + j * ldg, ldg);
}

// the tokens in pieces, each summed by itself: one sum over all of them would round with every token
inline void outer_of_block(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t tokens, int64_t c, int64_t r, float* g) {
  constexpr int64_t kPiece = 32;
  for (int64_t from = 0; from < tokens; from += kPiece, x += kPiece * ldx, w += kPiece * ldw) {
    const int64_t t = least(kPiece, tokens - from);
    int64_t k = 0;
    for (; k + kWide * kLanes <= c; k += kWide * kLanes) outer_of_rank<kWide>(x + k, ldx, w, ldw, t, r, g + k, c);
    for (; k + kLanes <= c; k += kLanes) outer_of_rank<1>(x + k, ldx, w, ldw, t, r, g + k, c);
    for (; k < c; ++k) {
      for (int64_t j = 0; j < r; ++j) {
        float sum = 0;
        for (int64_t i = 0; i < t; ++i) sum += w[i * ldw + j] * x[i * ldx + k];
        g[j * c + k] += sum;
      }
    }
  }
}

#if FASTPEFT_LANES == 16
#define FASTPEFT_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// dots, for bfloat16 x and f and c a multiple of 32: two products an instruction
template <int M, int N>
FASTPEFT_BF16 void dots_of_bf16(const BFloat16* x, int64_t ldx, const BFloat16* f, int64_t c, float* out, int64_t ldo) {
  __m512 acc[16];
  for (int q = 0; q < 16; ++q) acc[q] = _mm512_setzero_ps();
  for (int64_t k = 0; k < c; k += 32) {
    __m512bh b[N];
    for (int j = 0; j < N; ++j) b[j] = (__m512bh)_mm512_loadu_si512(f + j * c + k);
    for (int i = 0; i < M; ++i) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x + i * ldx + k);
      for (int j = 0; j < N; ++j) acc[4 * i + j] = _mm512_dpbf16_ps(acc[4 * i + j], a, b[j]);
    }
  }
  float total[16];
  put(total, sums(reinterpret_cast<Vec*>(acc)));
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) out[i * ldo + j] = total[4 * i + j];
  }
}

template <int M>
void dots_of_rank_bf16(const BFloat16* x, int64_t ldx, const BFloat16* f, int64_t c, int64_t r, float* out, int64_t ldo) {
  int64_t j = 0;
  for (; j + 4 <= r; j += 4) dots_of_bf16<M, 4>(x, ldx, f + j * c, c, out + j, ldo);
  for (; j < r; ++j) dots_of_bf16<M, 1>(x, ldx, f + j * c, c, out + j, ldo);
}

// outer, for bfloat16 x and w: 8 ranks and 32 columns of two tokens at a
// time. wp [pieces of two tokens, r]: the two tokens' w side by side. An odd last token is paired with zeros.
FASTPEFT_BF16
void outer_of_bf16(const BFloat16* x, int64_t ldx, const uint32_t* wp, int64_t ldw, int64_t tokens, int64_t c, int64_t r, float* g) {
  constexpr int kRanks = 8;
  // unpacking interleaves within 128 bits: column 4 q + i of `low` is column 8 q + i, of `high` column 8 q + 4 + i
  const __m512i to_first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i to_second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t k = 0; k + 32 <= c; k += 32) {
    for (int64_t j = 0; j < r; j += kRanks) {
      const int ranks = static_cast<int>(least(kRanks, r - j));
      __m512 low[kRanks], high[kRanks];
      for (int q = 0; q < kRanks; ++q) low[q] = high[q] = _mm512_setzero_ps();
      for (int64_t t = 0; t < tokens; t += 2) {
        const __m512i first = _mm512_loadu_si512(x + t * ldx + k);
        const __m512i second = t + 1 < tokens ? _mm512_loadu_si512(x + (t + 1) * ldx + k) : _mm512_setzero_si512();
        const __m512bh a = (__m512bh)_mm512_unpacklo_epi16(first, second);
        const __m512bh b = (__m512bh)_mm512_unpackhi_epi16(first, second);
        const uint32_t* w = wp + t / 2 * ldw + j;
        if (ranks == kRanks) {
          for (int q = 0; q < kRanks; ++q) {
            const __m512bh v = (__m512bh)_mm512_set1_epi32(static_cast<int>(w[q]));
            low[q] = _mm512_dpbf16_ps(low[q], a, v);
            high[q] = _mm512_dpbf16_ps(high[q], b, v);
          }
        } else {
          for (int q = 0; q < ranks; ++q) {
            const __m512bh v = (__m512bh)_mm512_set1_epi32(static_cast<int>(w[q]));
            low[q] = _mm512_dpbf16_ps(low[q], a, v);
            high[q] = _mm512_dpbf16_ps(high[q], b, v);
          }
        }
      }
      for (int q = 0; q < ranks; ++q) {
        float* at = g + (j + q) * c + k;
        const __m512 one = _mm512_permutex2var_ps(low[q], to_first, high[q]);
        const __m512 two = _mm512_permutex2var_ps(low[q], to_second, high[q]);
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), one));
        _mm512_storeu_ps(at + 16, _mm512_add_ps(_mm512_loadu_ps(at + 16), two));
      }
    }
  }
}
#endif

// out[i, c] (+)= sum over r of u[i, r] f[r, c], for M rows and V vectors of columns
template <bool kAdd, int M, int V>
inline void spread(const float* u, int64_t ldu, const float* f, int64_t ldf, int64_t r, float* out, int64_t ldo) {
  Vec acc[M][V] = {};
  for (int64_t j = 0; j < r; ++j) {
    Vec b[V];
    for (int v = 0; v < V; ++v) b[v] = get(f + j * ldf + v * kLanes);
    for (int i = 0; i < M; ++i) {
      const Vec a = splat(u[i * ldu + j]);
      for (int v = 0; v < V; ++v) acc[i][v] += a * b[v];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < V; ++v) {
      float* at = out + i * ldo + v * kLanes;
      put(at, kAdd ? get(at) + acc[i][v] : acc[i][v]);
    }
  }
}

template <bool kAdd, int M>
inline void spread_of_columns(const float* u, int64_t ldu, const float* f, int64_t ldf, int64_t r, int64_t c, float* out, int64_t ldo) {
  int64_t k = 0;
  for (; k + kWide * kLanes <= c; k += kWide * kLanes) spread<kAdd, M, kWide>(u, ldu, f + k, ldf, r, out + k, ldo);
  for (; k + kLanes <= c; k += kLanes) spread<kAdd, M, 1>(u, ldu, f + k, ldf, r, out + k, ldo);
  for (; k < c; ++k) {
    for (int i = 0; i < M; ++i) {
      float sum = kAdd ? out[i * ldo + k] : 0.0f;
      for (int64_t j = 0; j < r; ++j) sum += u[i * ldu + j] * f[j * ldf + k];
      out[i * ldo + k] = sum;
    }
  }
}

template <bool kAdd>
void spread_of_rows(const float* u, int64_t ldu, const float* f, int64_t ldf, int64_t r, int64_t t, int64_t c, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + 4 <= t; i += 4) spread_of_columns<kAdd, 4>(u + i * ldu, ldu, f, ldf, r, c, out + i * ldo, ldo);
  for (; i < t; ++i) spread_of_columns<kAdd, 1>(u + i * ldu, ldu, f, ldf, r, c, out + i * ldo, ldo);
}

// ---- factors

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

// ---- work

constexpr int64_t kCache = 384 << 10;  // bytes of x that are read twice while a core's second-level cache holds them
constexpr int64_t kWorth = 1 << 15;    // numbers below which a second thread costs more than it saves
constexpr int64_t kRows = 16;          // rows and columns that are written at a time: with the factor's columns they
constexpr int64_t kColumns = 256;      // stay in the first-level cache

int parts_for(int64_t rows, int64_t cols, int threads) {
  const int64_t worth = most(1, rows * cols / kWorth);
  return static_cast<int>(least(least(most(1, threads), worth), most(1, rows)));
}

struct Range {
  int64_t begin, end;
};

// the rows of one part, a multiple of four but for the last
Range range_of(int64_t rows, int parts, int part) {
  const int64_t step = ((rows + parts - 1) / parts + 3) / 4 * 4;
  return {least(rows, part * step), least(rows, (part + 1) * step)};
}

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

// ---- a small layer, whole

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

LowRank functions() { return {read, write, norm, small_forward, small_backward}; }

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
