// Python bindings: plain pointers and sizes, no torch header, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "dropout_cpu.h"
#include "lowrank.h"
#include "quant/quant.h"
#include "sparse/sparse.h"
#ifdef FASTPEFT_CUDA
#include "dropout_cuda.h"
#include "sparse/sparse_cuda.h"
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

fastpeft::Entries entries(uintptr_t index, int64_t nnz, int64_t rows, int64_t cols) {
  return {reinterpret_cast<const int32_t*>(index), nnz, rows, cols};
}

// found while the index was read: before that, nothing was written
void need_fit(bool fit, const char* who, int64_t rows, int64_t cols) {
  if (fit) return;
  throw std::invalid_argument(std::string(who) + ": index must hold rows and columns of a [" + std::to_string(rows) + ", " +
                              std::to_string(cols) + "] matrix in row-major order, none twice; sort it and drop repetitions.");
}

void sparse_grad(uintptr_t dz, int64_t dz_stride, int dz_dtype, uintptr_t x, int64_t x_stride, int x_dtype, int64_t t,
                 uintptr_t index, int64_t nnz, int64_t rows, int64_t cols, uintptr_t out, int threads) {
  const bool fit = fastpeft::sparse_grad({matrix(dz, dz_stride, dz_dtype), matrix(x, x_stride, x_dtype), t,
                                          entries(index, nnz, rows, cols), floats(out), threads});
  need_fit(fit, "sparse_grad", rows, cols);
}

void sparse_add(uintptr_t y, int64_t y_stride, int y_dtype, uintptr_t x, int64_t x_stride, int x_dtype, int64_t t, uintptr_t index,
                int64_t nnz, int64_t rows, int64_t cols, uintptr_t values, bool transposed, int threads) {
  const bool fit = fastpeft::sparse_add({matrix(y, y_stride, y_dtype), matrix(x, x_stride, x_dtype), t,
                                         entries(index, nnz, rows, cols), floats(values), transposed, threads});
  need_fit(fit, "sparse_add", rows, cols);
}

void sparse_copy(uintptr_t w, int64_t w_stride, uintptr_t out, int64_t out_stride, int dtype, uintptr_t index, int64_t nnz,
                 int64_t rows, int64_t cols, uintptr_t values, int threads) {
  const bool fit = fastpeft::sparse_copy(matrix(w, w_stride, dtype), matrix(out, out_stride, dtype),
                                         entries(index, nnz, rows, cols), floats(values), threads);
  need_fit(fit, "sparse_copy", rows, cols);
}

void sparse_put(uintptr_t w, int64_t w_stride, int dtype, uintptr_t index, int64_t nnz, int64_t rows, int64_t cols,
                uintptr_t values, uintptr_t saved, int threads) {
  const bool fit = fastpeft::sparse_put(matrix(w, w_stride, dtype), entries(index, nnz, rows, cols), floats(values),
                                        reinterpret_cast<void*>(saved), threads);
  need_fit(fit, "sparse_put", rows, cols);
}

void sparse_restore(uintptr_t w, int64_t w_stride, int dtype, uintptr_t index, int64_t nnz, int64_t rows, int64_t cols,
                    uintptr_t saved, int threads) {
  const bool fit = fastpeft::sparse_restore(matrix(w, w_stride, dtype), entries(index, nnz, rows, cols),
                                            reinterpret_cast<const void*>(saved), threads);
  need_fit(fit, "sparse_restore", rows, cols);
}

void dequantise(uintptr_t codes, int bits, uintptr_t levels, uintptr_t absmax, int64_t block, uintptr_t table, uintptr_t nested,
                double offset, int64_t group, uintptr_t out, int dtype, int64_t numbers, int threads) {
  const bool own = table == 0;
  const fastpeft::Scales scales{floats(own ? absmax : nested), reinterpret_cast<const uint8_t*>(absmax), floats(table),
                                static_cast<float>(offset), group};
  fastpeft::dequantise({reinterpret_cast<const uint8_t*>(codes), bits, floats(levels), block}, scales,
                       reinterpret_cast<void*>(out), dtype, numbers, threads);
}

void dequantise_rows(uintptr_t codes, uintptr_t absmax, uintptr_t out, int dtype, int64_t rows, int64_t cols, int threads) {
  fastpeft::dequantise_rows(reinterpret_cast<const int8_t*>(codes), floats(absmax), reinterpret_cast<void*>(out), dtype, rows, cols,
                            threads);
}

#ifdef FASTPEFT_CUDA
void need_success(int error, const char* who) {
  if (error == -1) throw std::invalid_argument(std::string(who) + ": unknown dtype code");
  if (error != 0) throw std::runtime_error(std::string(who) + ": CUDA error " + std::to_string(error));
}

template <typename T = void>
T* at(uintptr_t data) {
  return reinterpret_cast<T*>(data);
}

void sparse_columns_cuda(uintptr_t to, int64_t ld, uintptr_t x, int64_t stride, int dtype, int64_t tokens, int64_t cols,
                         uintptr_t stream) {
  need_success(fastpeft_sparse_columns_cuda(at(to), ld, at(x), stride, dtype, tokens, cols, at(stream)), "sparse_columns_cuda");
}

void sparse_grad_cuda(uintptr_t out, uintptr_t dz, uintptr_t x, int64_t ld, int dtype, uintptr_t index, int64_t nnz,
                      uintptr_t stream) {
  need_success(fastpeft_sparse_grad_cuda(floats(out), at(dz), at(x), ld, dtype, at<int32_t>(index), nnz, at(stream)),
               "sparse_grad_cuda");
}

void sparse_gather_cuda(uintptr_t out, uintptr_t chunk, int64_t stride, int dtype, int64_t row0, uintptr_t index, int64_t nnz,
                        int64_t begin, int64_t end, bool add, uintptr_t stream) {
  need_success(fastpeft_sparse_gather_cuda(floats(out), at(chunk), stride, dtype, row0, at<int32_t>(index), nnz, begin, end, add,
                                           at(stream)),
               "sparse_gather_cuda");
}

void sparse_copy_cuda(uintptr_t out, int64_t out_stride, uintptr_t w, int64_t stride, int dtype, int64_t rows, int64_t cols,
                      uintptr_t index, uintptr_t values, int64_t nnz, uintptr_t stream) {
  need_success(fastpeft_sparse_copy_cuda(at(out), out_stride, at(w), stride, dtype, rows, cols, at<int32_t>(index), floats(values),
                                         nnz, at(stream)),
               "sparse_copy_cuda");
}

void sparse_put_cuda(uintptr_t w, int64_t stride, int dtype, uintptr_t index, uintptr_t values, uintptr_t saved, int64_t nnz,
                     uintptr_t stream) {
  need_success(fastpeft_sparse_put_cuda(at(w), stride, dtype, at<int32_t>(index), floats(values), at(saved), nnz, at(stream)),
               "sparse_put_cuda");
}

void sparse_restore_cuda(uintptr_t w, int64_t stride, int dtype, uintptr_t index, uintptr_t saved, int64_t nnz, uintptr_t stream) {
  need_success(fastpeft_sparse_restore_cuda(at(w), stride, dtype, at<int32_t>(index), at(saved), nnz, at(stream)),
               "sparse_restore_cuda");
}

void dropout_cuda(uintptr_t out, int64_t out_stride0, int64_t out_stride1, uintptr_t x, int64_t x_stride0,
                  int64_t x_stride1, int dtype, bool add, uint64_t seed, int64_t row0, int64_t rows, int64_t cols,
                  uint32_t threshold, double factor, uintptr_t stream) {
  const fastpeft::DropoutCudaArgs args{out_stride0, out_stride1, x_stride0, x_stride1, seed,
                                       row0, rows, cols, threshold, factor, add};
  need_success(fastpeft_dropout_cuda(at(out), at(x), dtype, &args, at(stream)), "dropout_cuda");
}
#endif

py::dict build_info() {
  py::dict info;
  info["isa"] = fastpeft::isa_name();
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
  m.def("sparse_columns_cuda", &sparse_columns_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_grad_cuda", &sparse_grad_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_gather_cuda", &sparse_gather_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_copy_cuda", &sparse_copy_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_put_cuda", &sparse_put_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("sparse_restore_cuda", &sparse_restore_cuda, py::call_guard<py::gil_scoped_release>());
#endif
  if (fastpeft::lowrank_cpu().read != nullptr) {
    m.def("lowrank_read", &lowrank_read, py::call_guard<py::gil_scoped_release>());
    m.def("lowrank_write", &lowrank_write, py::call_guard<py::gil_scoped_release>());
    m.def("small_forward", &small_forward);
    m.def("small_backward", &small_backward);
    m.def("isa_use", [](const std::string& isa) { return fastpeft::isa_use(isa.c_str()); });
    m.def("lowrank_norm", &lowrank_norm, py::call_guard<py::gil_scoped_release>());
  }
  if (fastpeft::sparse_cpu().grad != nullptr) {
    m.def("sparse_grad", &sparse_grad, py::call_guard<py::gil_scoped_release>());
    m.def("sparse_add", &sparse_add, py::call_guard<py::gil_scoped_release>());
    m.def("sparse_copy", &sparse_copy, py::call_guard<py::gil_scoped_release>());
    m.def("sparse_put", &sparse_put, py::call_guard<py::gil_scoped_release>());
    m.def("sparse_restore", &sparse_restore, py::call_guard<py::gil_scoped_release>());
  }
  if (fastpeft::quant_cpu().piece != nullptr) {
    m.def("dequantise", &dequantise, py::call_guard<py::gil_scoped_release>());
    m.def("dequantise_rows", &dequantise_rows, py::call_guard<py::gil_scoped_release>());
  }
  m.def("build_info", &build_info);
}
