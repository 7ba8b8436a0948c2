// Part of lowrank_body.h: the products of one tile.
#pragma once

#include "floats.h"
#include "lowrank_vec.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

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

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
