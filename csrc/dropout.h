// The counter-based generator of fastpeft/ops/dropout.py, for CPU and CUDA code: Philox4x32, 7 rounds, eight 16-bit draws.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTPEFT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTPEFT_HD inline __attribute__((always_inline))
#else
#define FASTPEFT_HD inline
#endif

namespace fastpeft {

constexpr int kRounds = 7;

// The two key words; each round but the last is followed by bump().
struct Key {
  uint32_t k0, k1;

  FASTPEFT_HD explicit Key(uint64_t seed) : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}

  FASTPEFT_HD void bump() {
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
};

FASTPEFT_HD void philox_round(Key k, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
  const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
  c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k.k0;
  c1 = static_cast<uint32_t>(b);
  c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k.k1;
  c3 = static_cast<uint32_t>(a);
}

// words[4] of counter (group, row, 0, 0) under the 64-bit seed
FASTPEFT_HD void philox(uint64_t seed, uint32_t group, uint32_t row, uint32_t words[4]) {
  Key key(seed);
  uint32_t c0 = group, c1 = row, c2 = 0, c3 = 0;
  for (int n = 0; n < kRounds; ++n, key.bump()) philox_round(key, c0, c1, c2, c3);
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// draw i of the eight in words
FASTPEFT_HD uint32_t draw(const uint32_t words[4], int i) { return (words[i >> 1] >> ((i & 1) * 16)) & 0xFFFFu; }

}  // namespace fastpeft
