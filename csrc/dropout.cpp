// out = x * mask, or out += x * mask, on the CPU; rows are split over threads.
#include "dropout.h"

#include <algorithm>
#include <cstring>

#include "dropout_cpu.h"
#include "floats.h"
#include "parallel.h"

// One body, compiled for plain x86-64 and for AVX2, picked when the module is loaded; elsewhere the compiler's default.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPEFT_CLONES __attribute__((target_clones("default", "avx2")))
#else
#define FASTPEFT_CLONES
#endif

namespace fastpeft {
namespace {

constexpr int kLanes = 16;             // groups per pass of the generator: two AVX2 registers a word
constexpr int kBlock = 4 * kLanes * 8; // columns whose draws are held at a time

// The draws of `groups` groups from group g0 on; out is filled up to the next multiple of kLanes groups.
FASTPEFT_CLONES
void fill_draws(uint64_t seed, uint32_t g0, int groups, uint32_t row, uint16_t* out) {
  for (int from = 0; from < groups; from += kLanes, out += 8 * kLanes) {
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      c0[i] = g0 + static_cast<uint32_t>(from + i);
      c1[i] = row;
      c2[i] = c3[i] = 0;
    }
    Key key(seed);
    for (int n = 0; n < kRounds; ++n, key.bump()) {
      for (int i = 0; i < kLanes; ++i) philox_round(key, c0[i], c1[i], c2[i], c3[i]);
    }
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
      for (int j = 0; j < 8; ++j) out[8 * i + j] = static_cast<uint16_t>(draw(words, j));
    }
  }
}

template <typename Y, typename X, bool kAdd>
inline void apply(Y* out, int64_t out_stride, const X* x, int64_t x_stride, const uint16_t* draws, int n,
                  uint32_t threshold, Wide<Y, X> keep) {
  for (int i = 0; i < n; ++i) {
    const Wide<Y, X> factor = draws[i] >= threshold ? keep : 0;
    const Wide<Y, X> value = load(x[i * x_stride]) * factor;
    if constexpr (kAdd) {
      store(out + i * out_stride, load(out[i * out_stride]) + value);
    } else {
      store(out + i * out_stride, value);
    }
  }
}

template <typename Y, typename X, bool kAdd>
void rows(const DropoutArgs& a, int64_t begin, int64_t end) {
  alignas(64) uint16_t draws[kBlock];
  const auto keep = static_cast<Wide<Y, X>>(a.factor);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.cols; c += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, a.cols - c));
      fill_draws(a.seed, static_cast<uint32_t>(c / 8), (n + 7) / 8, static_cast<uint32_t>(a.row0 + r), draws);
      const X* x = static_cast<const X*>(a.x) + r * a.x_stride0 + c * a.x_stride1;
      Y* out = static_cast<Y*>(a.out) + r * a.out_stride0 + c * a.out_stride1;
      // strides known to be one let the compiler vectorise
      if (a.x_stride1 == 1 && a.out_stride1 == 1) {
        apply<Y, X, kAdd>(out, 1, x, 1, draws, n, a.threshold, keep);
      } else {
        apply<Y, X, kAdd>(out, a.out_stride1, x, a.x_stride1, draws, n, a.threshold, keep);
      }
    }
  }
}

using Rows = void (*)(const DropoutArgs&, int64_t, int64_t);

template <typename Y, typename X>
Rows pick_add(bool add) {
  return add ? rows<Y, X, true> : rows<Y, X, false>;
}

template <typename Y>
Rows pick_x(int x_dtype, bool add) {
  switch (x_dtype) {
    case 0: return pick_add<Y, double>(add);
    case 1: return pick_add<Y, float>(add);
    case 2: return pick_add<Y, BFloat16>(add);
    case 3: return pick_add<Y, Float16>(add);
    default: return nullptr;
  }
}

Rows pick(int out_dtype, int x_dtype, bool add) {
  switch (out_dtype) {
    case 0: return pick_x<double>(x_dtype, add);
    case 1: return pick_x<float>(x_dtype, add);
    case 2: return pick_x<BFloat16>(x_dtype, add);
    case 3: return pick_x<Float16>(x_dtype, add);
    default: return nullptr;
  }
}

struct Job {
  Rows run;
  const DropoutArgs& a;
  int64_t step;
};

void part(void* context, int k) {
  const Job& job = *static_cast<const Job*>(context);
  job.run(job.a, std::min(job.a.rows, k * job.step), std::min(job.a.rows, (k + 1) * job.step));
}

void threaded(Rows run, const DropoutArgs& a) {
  // 128 Ki numbers take some 100 us, several times what starting a thread costs
  const int64_t worth = std::max<int64_t>(1, a.rows * a.cols >> 17);
  const int64_t n = std::min({static_cast<int64_t>(std::max(1, a.threads)), worth, std::max<int64_t>(1, a.rows)});
  Job job{run, a, (a.rows + n - 1) / n};
  parallel(static_cast<int>(n), part, &job);
}

}  // namespace

void dropout_draws(uint64_t seed, uint32_t g0, int groups, uint32_t row, uint16_t* out) {
  fill_draws(seed, g0, groups, row, out);
}

bool dropout_cpu(const DropoutArgs& a, int out_dtype, int x_dtype, bool add) {
  const Rows run = pick(out_dtype, x_dtype, add);
  if (run == nullptr) return false;
  if (a.rows > 0 && a.cols > 0) threaded(run, a);
  return true;
}

}  // namespace fastpeft
