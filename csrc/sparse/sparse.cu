// Kernels of sparse_cuda.h. They have been compiled, not yet run: nothing selects them.
#include "sparse_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTile = 64;  // tokens and columns of a transposed tile

__device__ inline float wide(float v) { return v; }
__device__ inline float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float wide(__half v) { return __half2float(v); }

__device__ inline void narrow(float* to, float v) { *to = v; }
__device__ inline void narrow(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }
__device__ inline void narrow(__half* to, float v) { *to = __float2half_rn(v); }

// sixteen bytes of tokens
template <typename T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  float v[kSize];

  __device__ explicit Pack(const T* from) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    T numbers[kSize];
    memcpy(numbers, &bits, 16);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = wide(numbers[i]);
  }
};

template <typename T>
__device__ inline float add_dot(const Pack<T>& a, const Pack<T>& b, float sum) {
  // the setup compiles with -fmad=false; here a fused multiply-add is wanted
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) sum = __fmaf_rn(a.v[i], b.v[i], sum);
  return sum;
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
  return v;
}

// Tiles are read along columns and written along tokens, each by a warp at consecutive addresses.
template <typename T>
__global__ void columns_kernel(T* to, int64_t ld, const T* x, int64_t stride, int64_t tokens, int64_t cols) {
  __shared__ T tile[kTile][kTile + 4 / sizeof(T)];  // a bank further in each row
  const int64_t across = (cols + kTile - 1) / kTile, tiles = across * ((ld + kTile - 1) / kTile);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t at = blockIdx.x; at < tiles; at += gridDim.x) {
    const int64_t t0 = at / across * kTile, c0 = at % across * kTile;
    for (int i = warp; i < kTile; i += kWarps) {
#pragma unroll
      for (int j = lane; j < kTile; j += 32) {
        T v = static_cast<T>(0.0f);
        if (t0 + i < tokens && c0 + j < cols) v = x[(t0 + i) * stride + c0 + j];
        tile[i][j] = v;
      }
    }
    __syncthreads();
    for (int j = warp; j < kTile; j += kWarps) {
#pragma unroll
      for (int i = lane; i < kTile; i += 32) {
        if (c0 + j < cols && t0 + i < ld) to[(c0 + j) * ld + t0 + i] = tile[i][j];
      }
    }
    __syncthreads();
  }
}

// A warp forms kEntries consecutive entries; where they are all of one row, as in a dense row, dz is read once for them.
template <typename T, int kEntries>
__global__ void __launch_bounds__(kThreads, 2) grad_kernel(float* out, const T* dz, const T* x, int64_t ld, const int32_t* index, int64_t nnz) {
  constexpr int kStep = 32 * Pack<T>::kSize;
  const int lane = threadIdx.x % 32, offset = lane * Pack<T>::kSize;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; warp * kEntries < nnz; warp += warps) {
    const int64_t first = warp * kEntries;
    const int32_t *row = index + first, *col = row + nnz;
    const int64_t left = nnz - first;
    float sum[kEntries] = {};
    if (left >= kEntries && row[0] == row[kEntries - 1]) {
      const T* const z = dz + row[0] * ld;
      const T* xs[kEntries];
#pragma unroll
      for (int q = 0; q < kEntries; ++q) xs[q] = x + col[q] * ld;
#pragma unroll 2
      for (int64_t t = offset; t < ld; t += kStep) {
        const Pack<T> zs(z + t);
#pragma unroll
        for (int q = 0; q < kEntries; ++q) sum[q] = add_dot(zs, Pack<T>(xs[q] + t), sum[q]);
      }
    } else {
#pragma unroll
      for (int q = 0; q < kEntries; ++q) {
        if (q >= left) break;
        const T *z = dz + row[q] * ld, *xs = x + col[q] * ld;
#pragma unroll 4
        for (int64_t t = offset; t < ld; t += kStep) sum[q] = add_dot(Pack<T>(z + t), Pack<T>(xs + t), sum[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < kEntries; ++q) {
      const float total = warp_sum(sum[q]);
      if (lane == 0 && q < left) out[first + q] = total;
    }
  }
}

template <typename T>
__global__ void gather_kernel(float* out, const T* chunk, int64_t stride, int64_t row0, const int32_t* index, int64_t nnz, int64_t begin,
                              int64_t end, bool add) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t k = begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < end; k += step) {
    const float v = wide(chunk[(index[k] - row0) * stride + index[nnz + k]]);
    out[k] = add ? out[k] + v : v;
  }
}

// out and w may be one; saved: what w held, or null
template <typename T>
__global__ void put_kernel(T* out, int64_t out_stride, const T* w, int64_t stride, const int32_t* index, const float* values, T* saved,
                           int64_t nnz) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < nnz; k += step) {
    const int64_t row = index[k], col = index[nnz + k];
    const T old = w[row * stride + col];
    if (saved != nullptr) saved[k] = old;
    narrow(out + row * out_stride + col, __fadd_rn(wide(old), values[k]));
  }
}

template <typename T>
__global__ void restore_kernel(T* w, int64_t stride, const int32_t* index, const T* saved, int64_t nnz) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < nnz; k += step) {
    w[index[k] * stride + index[nnz + k]] = saved[k];
  }
}

// what does not fit the grid is reached by striding
unsigned blocks_for(int64_t work, int64_t size) {
  const int64_t blocks = (work + size - 1) / size;
  return static_cast<unsigned>(blocks < 1 << 20 ? blocks : 1 << 20);
}

int failure() { return static_cast<int>(cudaGetLastError()); }

cudaStream_t on(void* stream) { return static_cast<cudaStream_t>(stream); }

template <typename T>
int columns(void* to, int64_t ld, const void* x, int64_t stride, int64_t tokens, int64_t cols, void* stream) {
  const int64_t tiles = ((cols + kTile - 1) / kTile) * ((ld + kTile - 1) / kTile);
  if (tiles == 0) return 0;
  columns_kernel<T><<<blocks_for(tiles, 1), kThreads, 0, on(stream)>>>(static_cast<T*>(to), ld, static_cast<const T*>(x), stride, tokens, cols);
  return failure();
}

template <typename T>
int grad(float* out, const void* dz, const void* x, int64_t ld, const int32_t* index, int64_t nnz, void* stream) {
  if (nnz == 0) return 0;
  const T *z = static_cast<const T*>(dz), *xs = static_cast<const T*>(x);
  // few entries: one a warp, or most of the device would idle
  if (nnz < 1 << 15) {
    grad_kernel<T, 1><<<blocks_for(nnz, kWarps), kThreads, 0, on(stream)>>>(out, z, xs, ld, index, nnz);
  } else {
    grad_kernel<T, 4><<<blocks_for(nnz, 4 * kWarps), kThreads, 0, on(stream)>>>(out, z, xs, ld, index, nnz);
  }
  return failure();
}

template <typename T>
int gather(float* out, const void* chunk, int64_t stride, int64_t row0, const int32_t* index, int64_t nnz, int64_t begin, int64_t end,
           bool add, void* stream) {
  if (begin >= end) return 0;
  gather_kernel<T><<<blocks_for(end - begin, kThreads), kThreads, 0, on(stream)>>>(out, static_cast<const T*>(chunk), stride, row0, index,
                                                                                   nnz, begin, end, add);
  return failure();
}

template <typename T>
int put(void* out, int64_t out_stride, const void* w, int64_t stride, const int32_t* index, const float* values, void* saved, int64_t nnz,
        void* stream) {
  if (nnz == 0) return 0;
  put_kernel<T><<<blocks_for(nnz, kThreads), kThreads, 0, on(stream)>>>(static_cast<T*>(out), out_stride, static_cast<const T*>(w), stride,
                                                                        index, values, static_cast<T*>(saved), nnz);
  return failure();
}

template <typename T>
int copy(void* out, int64_t out_stride, const void* w, int64_t stride, int64_t rows, int64_t cols, const int32_t* index,
         const float* values, int64_t nnz, void* stream) {
  if (rows == 0 || cols == 0) return 0;
  const cudaError_t error = cudaMemcpy2DAsync(out, out_stride * sizeof(T), w, stride * sizeof(T), cols * sizeof(T), rows,
                                              cudaMemcpyDeviceToDevice, on(stream));
  if (error != cudaSuccess) return static_cast<int>(error);
  return put<T>(out, out_stride, w, stride, index, values, nullptr, nnz, stream);
}

template <typename T>
int restore(void* w, int64_t stride, const int32_t* index, const void* saved, int64_t nnz, void* stream) {
  if (nnz == 0) return 0;
  restore_kernel<T><<<blocks_for(nnz, kThreads), kThreads, 0, on(stream)>>>(static_cast<T*>(w), stride, index, static_cast<const T*>(saved), nnz);
  return failure();
}

}  // namespace

#define FASTPEFT_OF_DTYPE(function, ...)                       \
  switch (dtype) {                                             \
    case 1: return function<float>(__VA_ARGS__);               \
    case 2: return function<__nv_bfloat16>(__VA_ARGS__);       \
    case 3: return function<__half>(__VA_ARGS__);              \
    default: return -1;                                        \
  }

extern "C" int fastpeft_sparse_columns_cuda(void* to, int64_t ld, const void* x, int64_t stride, int dtype, int64_t tokens, int64_t cols,
                                            void* stream) {
  FASTPEFT_OF_DTYPE(columns, to, ld, x, stride, tokens, cols, stream)
}

extern "C" int fastpeft_sparse_grad_cuda(float* out, const void* dz, const void* x, int64_t ld, int dtype, const int32_t* index,
                                         int64_t nnz, void* stream) {
  FASTPEFT_OF_DTYPE(grad, out, dz, x, ld, index, nnz, stream)
}

extern "C" int fastpeft_sparse_gather_cuda(float* out, const void* chunk, int64_t stride, int dtype, int64_t row0, const int32_t* index,
                                           int64_t nnz, int64_t begin, int64_t end, bool add, void* stream) {
  FASTPEFT_OF_DTYPE(gather, out, chunk, stride, row0, index, nnz, begin, end, add, stream)
}

extern "C" int fastpeft_sparse_copy_cuda(void* out, int64_t out_stride, const void* w, int64_t stride, int dtype, int64_t rows,
                                         int64_t cols, const int32_t* index, const float* values, int64_t nnz, void* stream) {
  FASTPEFT_OF_DTYPE(copy, out, out_stride, w, stride, rows, cols, index, values, nnz, stream)
}

extern "C" int fastpeft_sparse_put_cuda(void* w, int64_t stride, int dtype, const int32_t* index, const float* values, void* saved,
                                        int64_t nnz, void* stream) {
  FASTPEFT_OF_DTYPE(put, w, stride, w, stride, index, values, saved, nnz, stream)
}

// numbers of as many bits: their bits are what counts
extern "C" int fastpeft_sparse_restore_cuda(void* w, int64_t stride, int dtype, const int32_t* index, const void* saved, int64_t nnz,
                                            void* stream) {
  switch (dtype) {
    case 1: return restore<uint32_t>(w, stride, index, saved, nnz, stream);
    case 2:
    case 3: return restore<uint16_t>(w, stride, index, saved, nnz, stream);
    default: return -1;
  }
}
