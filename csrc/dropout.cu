// The launcher of the dropout generator on CUDA: plain C, bound by module.cpp where nvcc was found.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "dropout.h"
#include "dropout_cuda.h"

namespace {

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kThreads = 256;

// One thread a group of eight columns. Compiled with -fmad=false: a fused multiply-add would change the bits of the sum.
template <typename T>
__global__ void dropout_kernel(T* out, const T* x, fastpeft::DropoutCudaArgs a) {
  const int64_t groups = (a.cols + 7) / 8;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < a.rows * groups; at += stride) {
    const int64_t r = at / groups, g = at % groups;
    uint32_t words[4];
    fastpeft::philox(a.seed, static_cast<uint32_t>(g), static_cast<uint32_t>(a.row0 + r), words);
    for (int i = 0; i < 8 && g * 8 + i < a.cols; ++i) {
      const int64_t c = g * 8 + i;
      const Wide<T> factor = fastpeft::draw(words, i) >= a.threshold ? static_cast<Wide<T>>(a.factor) : 0;
      const Wide<T> value = static_cast<Wide<T>>(x[r * a.x_stride0 + c * a.x_stride1]) * factor;
      T* to = out + r * a.out_stride0 + c * a.out_stride1;
      *to = static_cast<T>(a.add ? static_cast<Wide<T>>(*to) + value : value);
    }
  }
}

template <typename T>
int launch(void* out, const void* x, const fastpeft::DropoutCudaArgs& a, void* stream) {
  const int64_t blocks = (a.rows * ((a.cols + 7) / 8) + kThreads - 1) / kThreads;
  if (blocks == 0) return 0;
  dropout_kernel<T><<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kThreads, 0,
                      static_cast<cudaStream_t>(stream)>>>(static_cast<T*>(out), static_cast<const T*>(x), a);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

extern "C" int fastpeft_dropout_cuda(void* out, const void* x, int dtype, const fastpeft::DropoutCudaArgs* a,
                                     void* stream) {
  switch (dtype) {
    case 0: return launch<double>(out, x, *a, stream);
    case 1: return launch<float>(out, x, *a, stream);
    case 2: return launch<__nv_bfloat16>(out, x, *a, stream);
    case 3: return launch<__half>(out, x, *a, stream);
    default: return -1;
  }
}
