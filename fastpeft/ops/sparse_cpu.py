"""The sparse products in C++ (csrc/sparse/sparse.h), registered in torch.library; fastpeft.ops.sparse decides when they run.

index int32 [2, nnz] holds the rows and columns of the entries in row-major order, values [nnz] what they add. Operators
without an autograd formula, with fakes. Plain tensors skip the dispatcher and, with it, the version counter: `put` and
`restore` change W for so long as one product takes, and nothing that was saved for backward is invalid after them.
All functions raise ValueError, before anything is written, for shapes or dtypes that do not fit and for an index that leaves
the matrix, is not in row-major order or repeats an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.dropout import _EXTENSION, backend
from fastpeft.ops.library import register
from fastpeft.ops.lowrank_cpu import DTYPES, OWN

_BUILT = hasattr(_EXTENSION, "sparse_grad")


def runs(x: Tensor) -> bool:
    """Whether the C++ products take x [rows, cols], whatever its size: on the CPU, columns of stride one, not traced."""
    if not _BUILT or x.device.type != "cpu" or x.dtype not in DTYPES or x.stride(1) != 1:
        return False
    return not torch.compiler.is_compiling() and backend() != "torch"


def grad(dz: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """out[k] = sum over t of dz[t, row_k] * x[t, col_k], [nnz] in fp32; dz [t, out], x [t, in], each of its own dtype."""
    return (_run_grad if _plain(dz, x) else _GRAD)(dz, x, index)


def copy(W: Tensor, values: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """out = W with W + value at the entries, formed in fp32 and rounded once; W and out [out, in] of one dtype.

    out may be W itself. Returns out."""
    (_run_copy if _plain(W, out) else _COPY)(W, values, index, out)
    return out


def put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W[row_k, col_k] += values[k] in place, in fp32 and rounded once; returns what was there, [nnz] in W's dtype."""
    return (_run_put if _plain(W, values) else _PUT)(W, values, index)


def restore(W: Tensor, index: Tensor, saved: Tensor) -> None:
    """W[row_k, col_k] = saved[k], bit for bit; saved [nnz] as `put` returned it."""
    (_run_restore if _plain(W, saved) else _RESTORE)(W, index, saved)


def add(y: Tensor, x: Tensor, values: Tensor, index: Tensor) -> None:
    """y[t, row_k] += values[k] * x[t, col_k] in place; y [t, out] and x [t, in], which must not overlap.

    The sum over the entries of a row is formed in fp32; it and y are rounded together, once."""
    (_run_add if _plain(y, x) else _ADD)(y, x, values, index)


def add_t(dx: Tensor, dz: Tensor, values: Tensor, index: Tensor) -> None:
    """dx[t, col_k] += values[k] * dz[t, row_k] in place; dx [t, in] and dz [t, out], as `add`."""
    (_run_add_t if _plain(dx, dz) else _ADD_T)(dx, dz, values, index)


def _plain(a: Tensor, b: Tensor) -> bool:
    """Whether these are torch's own tensors and no subclass that must see the call (fake, functional, distributed)."""
    return type(a) in OWN and type(b) in OWN


def _matrix(who: str, name: str, m: Tensor) -> None:
    if m.dim() != 2 or m.dtype not in DTYPES or m.device.type != "cpu":
        raise ValueError(
            f"sparse_cpu.{who}: {name} is {tuple(m.shape)} in {m.dtype} on {m.device}; it must be two-dimensional, in float32, "
            "bfloat16 or float16, on the CPU."
        )


def _written(who: str, name: str, m: Tensor) -> None:
    _matrix(who, name, m)
    if m.stride(1) != 1 and m.shape[1] > 1:
        raise ValueError(
            f"sparse_cpu.{who}: {name} has strides {m.stride()}; its columns are written with stride 1; make it contiguous."
        )


def _read(who: str, name: str, m: Tensor) -> Tensor:
    _matrix(who, name, m)
    return m if m.stride(1) == 1 else m.contiguous()


def _entries(
    who: str, index: Tensor, values: Tensor | None, dtype: torch.dtype = torch.float32
) -> tuple[int, int]:
    """The address and number of the entries."""
    if (
        index.dtype is not torch.int32
        or index.dim() != 2
        or index.shape[0] != 2
        or not index.is_contiguous()
        or index.is_cuda
    ):
        raise ValueError(
            f"sparse_cpu.{who}: index is {tuple(index.shape)} in {index.dtype} with strides {index.stride()} on {index.device}; it must be "
            "int32 [2, nnz], rows then columns, contiguous, on the CPU."
        )
    nnz = index.shape[1]
    if values is not None and (tuple(values.shape) != (nnz,) or values.dtype is not dtype or values.is_cuda):
        raise ValueError(
            f"sparse_cpu.{who}: got {tuple(values.shape)} in {values.dtype} on {values.device} for {nnz} entries; it must be "
            f"({nnz},) in {dtype} on the CPU."
        )
    return index.data_ptr(), nnz


def _tokens(who: str, a: Tensor, b: Tensor) -> int:
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"sparse_cpu.{who}: {tuple(a.shape)} and {tuple(b.shape)} have different numbers of tokens; flatten both alike."
        )
    return a.shape[0]


def _at(m: Tensor) -> tuple[int, int, int]:
    return m.data_ptr(), m.stride(0), DTYPES[m.dtype]


def _run_grad(dz: Tensor, x: Tensor, index: Tensor) -> Tensor:
    dz, x = _read("grad", "dz", dz), _read("grad", "x", x)
    tokens, entries = _tokens("grad", dz, x), _entries("grad", index, None)
    out = torch.empty(entries[1], dtype=torch.float32)
    _EXTENSION.sparse_grad(
        *_at(dz), *_at(x), tokens, *entries, dz.shape[1], x.shape[1], out.data_ptr(), torch.get_num_threads()
    )
    return out


def _run_copy(W: Tensor, values: Tensor, index: Tensor, out: Tensor) -> None:
    W = _read("copy", "W", W)
    _written("copy", "out", out)
    if out.shape != W.shape or out.dtype is not W.dtype:
        raise ValueError(
            f"sparse_cpu.copy: out is {tuple(out.shape)} in {out.dtype} for W {tuple(W.shape)} in {W.dtype}; both must agree."
        )
    if out.data_ptr() == W.data_ptr() and out.stride() != W.stride():
        raise ValueError(
            f"sparse_cpu.copy: out, of strides {out.stride()}, shares memory with W, of {W.stride()}; pass W or new memory."
        )
    values = values.contiguous()
    entries = _entries("copy", index, values)
    _EXTENSION.sparse_copy(
        W.data_ptr(), W.stride(0), *_at(out), *entries, *W.shape, values.data_ptr(), torch.get_num_threads()
    )


def _run_put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    _written("put", "W", W)
    values = values.contiguous()
    entries = _entries("put", index, values)
    saved = torch.empty(entries[1], dtype=W.dtype)
    _EXTENSION.sparse_put(
        *_at(W), *entries, *W.shape, values.data_ptr(), saved.data_ptr(), torch.get_num_threads()
    )
    return saved


def _run_restore(W: Tensor, index: Tensor, saved: Tensor) -> None:
    _written("restore", "W", W)
    saved = saved.contiguous()
    entries = _entries("restore", index, saved, W.dtype)
    _EXTENSION.sparse_restore(*_at(W), *entries, *W.shape, saved.data_ptr(), torch.get_num_threads())


def _run_product(who: str, y: Tensor, x: Tensor, values: Tensor, index: Tensor, transposed: bool) -> None:
    _written(who, "what is added to", y)
    x, values = _read(who, "what is read", x), values.contiguous()
    tokens, entries = _tokens(who, y, x), _entries(who, index, values)
    rows, cols = (x.shape[1], y.shape[1]) if transposed else (y.shape[1], x.shape[1])
    _EXTENSION.sparse_add(
        *_at(y), *_at(x), tokens, *entries, rows, cols, values.data_ptr(), transposed, torch.get_num_threads()
    )


def _run_add(y: Tensor, x: Tensor, values: Tensor, index: Tensor) -> None:
    _run_product("add", y, x, values, index, False)


def _run_add_t(dx: Tensor, dz: Tensor, values: Tensor, index: Tensor) -> None:
    _run_product("add_t", dx, dz, values, index, True)


def _nothing(*args: Tensor) -> None:
    return None


_OPERATORS = (
    (
        "cpu_sparse_grad(Tensor dz, Tensor x, Tensor index) -> Tensor",
        _run_grad,
        lambda dz, x, index: x.new_empty(index.shape[1], dtype=torch.float32),
    ),
    ("cpu_sparse_copy(Tensor W, Tensor values, Tensor index, Tensor(a!) out) -> ()", _run_copy, _nothing),
    (
        "cpu_sparse_put(Tensor(a!) W, Tensor values, Tensor index) -> Tensor",
        _run_put,
        lambda W, values, index: W.new_empty(index.shape[1]),
    ),
    ("cpu_sparse_restore(Tensor(a!) W, Tensor index, Tensor saved) -> ()", _run_restore, _nothing),
    ("cpu_sparse_add(Tensor(a!) y, Tensor x, Tensor values, Tensor index) -> ()", _run_add, _nothing),
    ("cpu_sparse_add_t(Tensor(a!) dx, Tensor dz, Tensor values, Tensor index) -> ()", _run_add_t, _nothing),
)
register(_OPERATORS, "CPU")

# looked up once: resolving torch.ops.fastpeft.<name> costs microseconds a call
_GRAD = torch.ops.fastpeft.cpu_sparse_grad.default
_COPY = torch.ops.fastpeft.cpu_sparse_copy.default
_PUT = torch.ops.fastpeft.cpu_sparse_put.default
_RESTORE = torch.ops.fastpeft.cpu_sparse_restore.default
_ADD = torch.ops.fastpeft.cpu_sparse_add.default
_ADD_T = torch.ops.fastpeft.cpu_sparse_add_t.default
