// Stored weights made dense on the CPU.
//
//   dequantise       out[k] = levels[code k] * absmax[k / block]     codes of `bits` bits, the first of a byte in its highest bits
//   dequantise_rows  out[i, j] = codes[i, j] * (absmax[i] / 127)     codes int8
//
// Formed in fp32 and rounded to out's dtype once; dtypes: 1 float32, 2 bfloat16, 3 float16. The same bits come from any number
// of threads. `block` is a multiple of 32; the last block may be shorter.
#pragma once

#include <cstdint>

namespace fastpeft {

// absmax[b], or with a table: table[index[b]] * absmax[b / group] + offset, rounded after each of the two
struct Scales {
  const float* absmax;
  const uint8_t* index;
  const float* table;
  float offset;
  int64_t group;
};

struct Stored {
  const uint8_t* codes;
  int bits;
  const float* levels;
  int64_t block;
};

// Numbers begin .. end - 1 of a stored weight; begin is a multiple of the block, scales[0] is that of its block.
struct QuantPiece {
  Stored w;
  const float* scales;
  void* out;
  int dtype;
  int64_t begin, end;
};

// codes[k] * scale
struct QuantRow {
  const int8_t* codes;
  float scale;
  void* out;
  int dtype;
  int64_t begin, count;  // in out
};

struct Quant {
  void (*piece)(const QuantPiece&);
  void (*row)(const QuantRow&);
};

// The functions for this processor; null members where none was built for it.
Quant quant_cpu();

void dequantise(const Stored& w, const Scales& s, void* out, int dtype, int64_t numbers, int threads);
void dequantise_rows(const int8_t* codes, const float* absmax, void* out, int dtype, int64_t rows, int64_t cols, int threads);

}  // namespace fastpeft
