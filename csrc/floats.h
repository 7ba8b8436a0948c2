// Loads and stores of the four float types as float or double. The 16-bit types are converted with integer arithmetic:
// _Float16 needs GCC 12 in C++, calls a library function per number without F16C, and blocks vectorisation.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Never a symbol of its own: this header is also read by files that are compiled for other instruction sets.
#if defined(__GNUC__)
#define FASTPEFT_INLINE static inline __attribute__((always_inline))
#else
#define FASTPEFT_INLINE static inline
#endif

namespace fastpeft {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// the type in which x * mask and the sum are formed
template <typename A, typename B>
using Wide = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

FASTPEFT_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

FASTPEFT_INLINE float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

FASTPEFT_INLINE float load(float v) { return v; }
FASTPEFT_INLINE double load(double v) { return v; }
FASTPEFT_INLINE float load(BFloat16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

FASTPEFT_INLINE float load(Float16 v) {
  const uint32_t u = v.bits & 0x7FFFu;
  // a subnormal half is an integer times 2^-24; multiplying an integer keeps it exact under flush-to-zero too
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(u)) * 0x1p-24f);
  const uint32_t normal = (u << 13) + (112u << 23);
  const uint32_t special = (u << 13) | 0x7F800000u;
  const uint32_t magnitude = u < 0x400u ? small : u < 0x7C00u ? normal : special;
  return float_of(magnitude | (static_cast<uint32_t>(v.bits & 0x8000u) << 16));
}

template <typename W>
FASTPEFT_INLINE void store(float* p, W v) {
  *p = static_cast<float>(v);
}

FASTPEFT_INLINE void store(double* p, double v) { *p = v; }

// Round to nearest, ties to even. Only called with float: a double is rounded to float first, as torch rounds it.
FASTPEFT_INLINE void store(BFloat16* p, float v) {
  const uint32_t u = bits_of(v);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

FASTPEFT_INLINE void store(Float16* p, float v) {
  const uint32_t sign = (bits_of(v) >> 16) & 0x8000u, u = bits_of(v) & 0x7FFFFFFFu;
  // in [0.5, 1) the last bit of a float weighs 2^-24, like that of a subnormal half: the addition rounds
  const uint32_t small = bits_of(float_of(u) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (u - (112u << 23) + 0xFFFu + ((u >> 13) & 1u)) >> 13;
  const uint32_t special = u > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t magnitude = u < 0x38800000u ? small : u < 0x47800000u ? normal : special;
  p->bits = static_cast<uint16_t>(magnitude | sign);
}

}  // namespace fastpeft
