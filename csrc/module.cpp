// Python bindings: plain pointers and sizes, no torch header, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "dropout_cpu.h"
#ifdef FASTPEFT_CUDA
#include "dropout_cuda.h"
#endif

namespace py = pybind11;

namespace {

void dropout(uintptr_t out, int64_t out_stride0, int64_t out_stride1, int out_dtype, uintptr_t x, int64_t x_stride0,
             int64_t x_stride1, int x_dtype, bool add, uint64_t seed, int64_t row0, int64_t rows, int64_t cols,
             uint32_t threshold, double factor, int threads) {
  const fastpeft::DropoutArgs args{reinterpret_cast<void*>(out), out_stride0, out_stride1,
                                   reinterpret_cast<const void*>(x), x_stride0, x_stride1,
                                   seed, row0, rows, cols, threshold, factor, threads};
  if (!fastpeft::dropout_cpu(args, out_dtype, x_dtype, add)) throw std::invalid_argument("dropout: unknown dtype code");
}

#ifdef FASTPEFT_CUDA
void dropout_cuda(uintptr_t out, int64_t out_stride0, int64_t out_stride1, uintptr_t x, int64_t x_stride0,
                  int64_t x_stride1, int dtype, bool add, uint64_t seed, int64_t row0, int64_t rows, int64_t cols,
                  uint32_t threshold, double factor, uintptr_t stream) {
  const fastpeft::DropoutCudaArgs args{out_stride0, out_stride1, x_stride0, x_stride1, seed,
                                       row0, rows, cols, threshold, factor, add};
  const int error = fastpeft_dropout_cuda(reinterpret_cast<void*>(out), reinterpret_cast<const void*>(x), dtype, &args,
                                          reinterpret_cast<void*>(stream));
  if (error == -1) throw std::invalid_argument("dropout_cuda: unknown dtype code");
  if (error != 0) throw std::runtime_error("dropout_cuda: CUDA error " + std::to_string(error));
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = FASTPEFT_COMPILER;
  info["cpu_sources"] = FASTPEFT_CPU_SOURCES;
  info["cuda_sources"] = FASTPEFT_CUDA_SOURCES;
  info["cuda_architectures"] = FASTPEFT_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastpeft's compiled operations";
  m.def("dropout", &dropout, py::call_guard<py::gil_scoped_release>());
#ifdef FASTPEFT_CUDA
  m.def("dropout_cuda", &dropout_cuda, py::call_guard<py::gil_scoped_release>());
#endif
  m.def("build_info", &build_info);
}
