// Which build this processor runs; how the work is shared out; the scales. Nothing here depends on the instruction set, and
// nothing is contracted: a nested scale is rounded twice.
#include "quant.h"

#include <algorithm>
#include <vector>

#include "../isa.h"
#include "../parallel.h"

namespace fastpeft {

#ifdef FASTPEFT_X86
namespace avx2 {
Quant quant_functions();
}
namespace avx512 {
Quant quant_functions();
}
#endif

Quant quant_cpu() {
#ifdef FASTPEFT_X86
  return isa() == 2 ? avx512::quant_functions() : isa() == 1 ? avx2::quant_functions() : Quant{};
#else
  return Quant{};
#endif
}

namespace {

constexpr int64_t kPiece = 1 << 15;  // numbers of one piece of work, about
constexpr int64_t kBlocks = 1 << 10;  // at most so many blocks in a piece: kPiece numbers in the smallest blocks

template <typename Body>
void share(int64_t pieces, int threads, const Body& body) {
  struct Shared {
    const Body& body;
    int64_t pieces, parts;
  };
  Shared shared{body, pieces, std::min<int64_t>(pieces, std::max(1, threads))};
  if (shared.parts < 1) return;
  parallel(
      static_cast<int>(shared.parts),
      [](void* pointer, int part) {
        const Shared& s = *static_cast<Shared*>(pointer);
        for (int64_t k = part; k < s.pieces; k += s.parts) s.body(k);
      },
      &shared);
}

}  // namespace

void dequantise(const Stored& w, const Scales& s, void* out, int dtype, int64_t numbers, int threads) {
  const auto piece = quant_cpu().piece;
  const int64_t blocks = std::min(kBlocks, std::max<int64_t>(1, kPiece / w.block)), size = blocks * w.block;
  share((numbers + size - 1) / size, threads, [&](int64_t k) {
    const int64_t first = k * blocks, end = std::min(numbers, (k + 1) * size);
    if (s.table == nullptr) return piece({w, s.absmax + first, out, dtype, k * size, end});
    float scales[kBlocks];
    const int64_t count = (end - k * size + w.block - 1) / w.block;
    for (int64_t b = 0; b < count; ++b) {
      scales[b] = s.table[s.index[first + b]] * s.absmax[(first + b) / s.group] + s.offset;
    }
    piece({w, scales, out, dtype, k * size, end});
  });
}

void dequantise_rows(const int8_t* codes, const float* absmax, void* out, int dtype, int64_t rows, int64_t cols, int threads) {
  const auto row = quant_cpu().row;
  const int64_t many = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, cols));
  share((rows + many - 1) / many, threads, [&](int64_t k) {
    for (int64_t i = k * many; i < std::min(rows, (k + 1) * many); ++i) {
      row({codes + i * cols, absmax[i] * static_cast<float>(1.0 / 127.0), out, dtype, i * cols, cols});
    }
  });
}

}  // namespace fastpeft
