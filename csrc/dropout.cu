// Launchers of the dropout generator on CUDA: plain C, bound by module.cpp where nvcc was found.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "dropout.h"

namespace {

template <typename T>
__global__ void dropout_kernel(T* out, int64_t out_stride0, const T* x, int64_t x_stride0, bool add, uint64_t seed,
                               int64_t row0, int64_t rows, int64_t cols, uint32_t threshold, float factor) {
  const int64_t groups = (cols + 7) / 8;
  for (int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; at < rows * groups;
       at += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t r = at / groups, g = at % groups;
    uint32_t words[4];
    fastpeft::philox(seed, static_cast<uint32_t>(g), static_cast<uint32_t>(row0 + r), words);
    for (int i = 0; i < 8 && g * 8 + i < cols; ++i) {
      const int64_t c = g * 8 + i;
      const float kept = fastpeft::draw(words, i) >= threshold ? factor : 0.0f;
      const float value = static_cast<float>(x[r * x_stride0 + c]) * kept;
      T* to = out + r * out_stride0 + c;
      *to = static_cast<T>(add ? static_cast<float>(*to) + value : value);
    }
  }
}

template <typename T>
int launch(void* out, int64_t os, const void* x, int64_t xs, bool add, uint64_t seed, int64_t row0, int64_t rows,
           int64_t cols, uint32_t threshold, float factor, void* stream) {
  const int64_t work = rows * ((cols + 7) / 8);
  if (work == 0) return 0;
  const int blocks = static_cast<int>(work / 256 + 1 < 4096 ? work / 256 + 1 : 4096);
  dropout_kernel<T><<<blocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<T*>(out), os, static_cast<const T*>(x), xs, add, seed, row0, rows, cols, threshold, factor);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace

// Columns must be contiguous. dtype: 1 float32, 2 bfloat16, 3 float16. Returns a cudaError_t, or -1 for another dtype.
extern "C" int fastpeft_dropout_cuda(void* out, int64_t os, const void* x, int64_t xs, int dtype, bool add, uint64_t seed,
                                     int64_t row0, int64_t rows, int64_t cols, uint32_t threshold, float factor,
                                     void* stream) {
  switch (dtype) {
    case 1: return launch<float>(out, os, x, xs, add, seed, row0, rows, cols, threshold, factor, stream);
    case 2: return launch<__nv_bfloat16>(out, os, x, xs, add, seed, row0, rows, cols, threshold, factor, stream);
    case 3: return launch<__half>(out, os, x, xs, add, seed, row0, rows, cols, threshold, factor, stream);
    default: return -1;
  }
}
