// Python bindings: plain pointers and sizes, no torch header, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "dropout_cpu.h"
#include "lowrank.h"
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

using fastpeft::Matrix;

Matrix matrix(uintptr_t data, int64_t stride, int dtype) { return {reinterpret_cast<void*>(data), stride, dtype}; }
float* floats(uintptr_t data) { return reinterpret_cast<float*>(data); }

fastpeft::Mask mask(bool on, uint64_t seed, uint32_t threshold, double factor) {
  return {on, seed, threshold, static_cast<float>(factor)};
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;

fastpeft::Factor factor(uintptr_t data, const Strides& s, double scale, uintptr_t gain) {
  return {floats(data), std::get<0>(s), std::get<1>(s), std::get<2>(s), static_cast<float>(scale), floats(gain)};
}

// f and g share scale and gain: one is a factor's share of a product, the other its gradient
void lowrank_read(uintptr_t x, int64_t x_stride, int x_dtype, int64_t t, int64_t n, int64_t c, int64_t r, bool dropped,
                  uint64_t seed, uint32_t threshold, double keep, uintptr_t f, const Strides& strides, double scale,
                  uintptr_t gain, uintptr_t u, uintptr_t w, int64_t w_stride, uintptr_t g, uintptr_t z, int64_t z_stride,
                  uintptr_t dgain, int u_dtype, int threads) {
  fastpeft::lowrank_cpu().read({matrix(x, x_stride, x_dtype), t, n, c, r, mask(dropped, seed, threshold, keep),
                                factor(f, strides, scale, gain), matrix(u, n * r, u_dtype), matrix(w, w_stride, u_dtype),
                                factor(g, strides, scale, gain), matrix(z, z_stride, x_dtype), floats(dgain), threads});
}

void lowrank_write(uintptr_t z, int64_t z_stride, int dtype, int64_t t, int64_t n, int64_t c, int64_t r, bool dropped,
                   uint64_t seed, uint32_t threshold, double keep, uintptr_t f, const Strides& strides, double scale,
                   uintptr_t u, int64_t u_stride, bool fresh, uintptr_t bias, uintptr_t gain, uintptr_t y, int threads) {
  fastpeft::lowrank_cpu().write({matrix(z, z_stride, dtype), t, n, c, r, mask(dropped, seed, threshold, keep),
                                 factor(f, strides, scale, 0), matrix(u, u_stride, dtype), fresh, floats(bias), floats(gain),
                                 matrix(y, n * c, dtype), threads});
}

void lowrank_norm(uintptr_t w, int64_t w_stride, int dtype, int64_t o, int64_t c, int64_t r, uintptr_t a, uintptr_t b,
                  double scale, uintptr_t out, uintptr_t inverse, uintptr_t rest, int threads) {
  fastpeft::lowrank_cpu().norm({matrix(w, w_stride, dtype), o, c, r, floats(a), floats(b), static_cast<float>(scale),
                                floats(out), floats(inverse), floats(rest), threads});
}

void small_forward(uintptr_t x, uintptr_t w, uintptr_t a, uintptr_t b, uintptr_t bias, uintptr_t gain, uintptr_t y,
                   uintptr_t kept, int64_t t, int64_t i, int64_t o, int64_t r, double scale, bool over) {
  fastpeft::lowrank_cpu().small_forward({floats(x), floats(w), floats(a), floats(b), floats(bias), floats(gain), floats(y),
                                         floats(kept), t, i, o, r, static_cast<float>(scale), over});
}

void small_backward(uintptr_t x, uintptr_t w, uintptr_t a, uintptr_t b, uintptr_t kept, uintptr_t dy, uintptr_t dx,
                    uintptr_t da, uintptr_t db, uintptr_t dbias, uintptr_t dgain, int64_t t, int64_t i, int64_t o, int64_t r,
                    double scale, bool has_gain) {
  fastpeft::lowrank_cpu().small_backward({floats(x), floats(w), floats(a), floats(b), floats(kept), floats(dy), floats(dx),
                                          floats(da), floats(db), floats(dbias), floats(dgain), t, i, o, r,
                                          static_cast<float>(scale), has_gain});
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
  info["lowrank"] = fastpeft::lowrank_isa();
  info["bf16_products"] = fastpeft::bf16_products();
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
  if (fastpeft::lowrank_cpu().read != nullptr) {
    m.def("lowrank_read", &lowrank_read, py::call_guard<py::gil_scoped_release>());
    m.def("lowrank_write", &lowrank_write, py::call_guard<py::gil_scoped_release>());
    m.def("small_forward", &small_forward);
    m.def("small_backward", &small_backward);
    m.def("lowrank_use", [](const std::string& isa) { return fastpeft::lowrank_use(isa.c_str()); });
    m.def("lowrank_norm", &lowrank_norm, py::call_guard<py::gil_scoped_release>());
  }
  m.def("build_info", &build_info);
}
