// Part of lowrank_body.h: vectors of the instruction set, and scratch memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#if FASTPEFT_LANES == 16
#include <immintrin.h>
#endif

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

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
