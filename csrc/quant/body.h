// The body of quant_<isa>.cpp: one source, compiled once per instruction set. As in lowrank_body.h, nothing here may be
// emitted as a symbol that another object also defines; tests/test_nf4_cpu.py looks at the objects.
//
// Up to 4 bits the levels times a block's scale are the block's own table, in registers: a number costs one look-up.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../floats.h"
#include "quant.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

// halves of each of the first eight bytes as bytes of their own, the upper one first; `bits` in a half
template <int bits>
inline __m128i halves(__m128i bytes) {
  const __m128i low = _mm_set1_epi8((1 << bits) - 1);
  return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, bits), low), _mm_and_si128(bytes, low));
}

// sixteen codes of at most four bits, from number k on, a byte each
inline __m128i sixteen(const Stored& w, int64_t k) {
  if (w.bits == 4) return halves<4>(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.codes + k / 2)));
  if (w.bits == 2) {
    int32_t four;
    std::memcpy(&four, w.codes + k / 4, 4);
    return halves<2>(halves<4>(_mm_cvtsi32_si128(four)));
  }
  return _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.codes + k)), _mm_set1_epi8(7));
}

// sixteen numbers of the table, by sixteen codes
inline void look(__m128i codes, const float* table, float* out) {
#if FASTPEFT_LANES == 16
  // all lanes; GCC 12 warns about the undefined vector in its own forms without a mask
  const __m512i at = _mm512_maskz_cvtepu8_epi32(0xFFFF, codes);
  _mm512_storeu_ps(out, _mm512_maskz_permutexvar_ps(0xFFFF, at, _mm512_loadu_ps(table)));
#else
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  for (int k = 0; k < 2; ++k) {
    const __m256i at = _mm256_cvtepu8_epi32(k ? _mm_srli_si128(codes, 8) : codes);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // bit 3 becomes the sign, which selects
    _mm256_storeu_ps(out + 8 * k, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), upper));
  }
#endif
}

// the same for 16-bit numbers, whose bytes are looked up apart: [0, 16) of `bytes` are the low ones
inline void look(__m128i codes, const __m128i* bytes, uint16_t* out) {
  const __m128i low = _mm_shuffle_epi8(bytes[0], codes), high = _mm_shuffle_epi8(bytes[1], codes);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(low, high));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi8(low, high));
}

// n numbers from number k on, of a table of sixteen; n is a multiple of sixteen
inline void look_up(const Stored& w, int64_t k, const float* table, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) look(sixteen(w, k + i), table, out + i);
}

template <typename T>
inline void look_up(const Stored& w, int64_t k, const float* table, T* out, int64_t n) {
  alignas(32) T words[16];
  for (int j = 0; j < 16; ++j) store(words + j, table[j]);
  const __m128i *at = reinterpret_cast<const __m128i*>(words), first = _mm_load_si128(at), second = _mm_load_si128(at + 1);
  const __m128i low = _mm_set1_epi16(255);
  const __m128i bytes[2] = {_mm_packus_epi16(_mm_and_si128(first, low), _mm_and_si128(second, low)),
                            _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8))};
  for (int64_t i = 0; i < n; i += 16) look(sixteen(w, k + i), bytes, reinterpret_cast<uint16_t*>(out + i));
}

inline int code_at(const Stored& w, int64_t k) {
  switch (w.bits) {
    case 4: return w.codes[k / 2] >> (k % 2 ? 0 : 4) & 15;
    case 2: return w.codes[k / 4] >> (6 - 2 * (k % 4)) & 3;
    default: return w.codes[k];
  }
}

template <typename T>
void piece_of(const QuantPiece& p) {
  T* out = static_cast<T*>(p.out);
  // a code beyond the table can only come from bytes that no quantiser wrote: masked, it reads nothing outside
  const int last = (1 << p.w.bits) - 1;
  for (int64_t at = p.begin, b = 0; at < p.end; at += p.w.block, ++b) {
    const float scale = p.scales[b];
    const int64_t n = p.end - at < p.w.block ? p.end - at : p.w.block;
    int64_t k = 0;
    if (p.w.bits <= 4) {
      float table[16];
      for (int j = 0; j < 16; ++j) table[j] = p.w.levels[j & last] * scale;
      k = n / 16 * 16;
      look_up(p.w, at, table, out + at, k);
    }
    for (; k < n; ++k) store(out + at + k, p.w.levels[code_at(p.w, at + k) & last] * scale);
  }
}

template <typename T>
void row_of(const QuantRow& r) {
  T* out = static_cast<T*>(r.out) + r.begin;
  const float scale = r.scale;
  for (int64_t k = 0; k < r.count; ++k) store(out + k, static_cast<float>(r.codes[k]) * scale);
}

void piece(const QuantPiece& p) {
  p.dtype == 1 ? piece_of<float>(p) : p.dtype == 2 ? piece_of<BFloat16>(p) : piece_of<Float16>(p);
}

void row(const QuantRow& r) { r.dtype == 1 ? row_of<float>(r) : r.dtype == 2 ? row_of<BFloat16>(r) : row_of<Float16>(r); }

}  // namespace

Quant quant_functions() { return {piece, row}; }

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
