// Python bindings: plain pointers and sizes, no torch header, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "dropout_cpu.h"

namespace py = pybind11;

namespace {

void dropout(uintptr_t out, int64_t out_stride0, int64_t out_stride1, uintptr_t x, int64_t x_stride0, int64_t x_stride1,
             int dtype, bool add, uint64_t seed, int64_t row0, int64_t rows, int64_t cols, uint32_t threshold,
             double factor, int threads) {
  const fastpeft::DropoutArgs args{reinterpret_cast<void*>(out), out_stride0, out_stride1,
                                   reinterpret_cast<const void*>(x), x_stride0, x_stride1,
                                   add, seed, row0, rows, cols, threshold, factor, threads};
  if (!fastpeft::dropout_cpu(args, dtype)) throw std::invalid_argument("dropout: unknown dtype code");
}

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
  m.def("build_info", &build_info);
}
