"""The sparse kernels in CUDA (csrc/sparse/sparse_cuda.h), on the current stream.

They have been compiled but never run, so nothing selects them: call them by name to measure them.

index int32 [2, nnz] holds rows and columns in row-major order without repetition, within the matrix; unlike on the CPU that is
not checked, because it would wait for the device. values [nnz] fp32. Rows of a matrix may have any stride.
All functions raise ValueError for tensors that are not on one CUDA device or do not fit, and RuntimeError where fastpeft._C
was built without CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.dropout import _EXTENSION
from fastpeft.ops.lowrank_cpu import DTYPES

# tokens of a transposed matrix are padded to sixteen bytes of the narrowest dtype
_PAD = 8


def built() -> bool:
    return hasattr(_EXTENSION, "sparse_grad_cuda")


def grad(dz: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """out[k] = sum over t of dz[t, row_k] * x[t, col_k], [nnz] in fp32; dz [t, out], x [t, in] of one dtype.

    Copies of both are made, tokens contiguous; one warp then forms an entry, or several of one row. The same bits every time."""
    _check("grad", index, matrices={"dz": dz, "x": x})
    if dz.dtype is not x.dtype or dz.shape[0] != x.shape[0]:
        raise ValueError(
            f"sparse_cuda.grad: dz is {tuple(dz.shape)} in {dz.dtype}, x {tuple(x.shape)} in {x.dtype}; both need the same tokens and dtype."
        )
    out = torch.empty(index.shape[1], dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        rows, cols = _columns(dz), _columns(x)
        _EXTENSION.sparse_grad_cuda(
            out.data_ptr(),
            rows.data_ptr(),
            cols.data_ptr(),
            cols.shape[1],
            DTYPES[x.dtype],
            index.data_ptr(),
            index.shape[1],
            _stream(),
        )
    return out


def gather(
    out: Tensor, chunk: Tensor, index: Tensor, row0: int, begin: int, end: int, *, accumulate: bool = False
) -> None:
    """out[k] = chunk[row_k - row0, col_k] for k from begin to end, or += with `accumulate`; out [nnz] in fp32.

    chunk holds the rows from row0 on of a dense gradient, and the entries from begin to end lie in it."""
    _check("gather", index, matrices={"chunk": chunk}, vectors={"out": (out, torch.float32)})
    if not 0 <= begin <= end <= index.shape[1] or row0 < 0:
        raise ValueError(
            f"sparse_cuda.gather: entries {begin} to {end} from row {row0} of {index.shape[1]} entries; they must be a range of them."
        )
    with torch.cuda.device(chunk.device):
        _EXTENSION.sparse_gather_cuda(
            out.data_ptr(), chunk.data_ptr(), chunk.stride(0), DTYPES[chunk.dtype], row0, index.data_ptr(), index.shape[1], begin, end,
            accumulate, _stream(),
        )  # fmt: skip


def copy(W: Tensor, values: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """out = W with W + value at the entries, formed in fp32 and rounded once; W and out [out, in] of one dtype. Returns out."""
    _check("copy", index, matrices={"W": W, "out": out}, vectors={"values": (values, torch.float32)})
    if out.shape != W.shape or out.dtype is not W.dtype:
        raise ValueError(
            f"sparse_cuda.copy: out is {tuple(out.shape)} in {out.dtype} for W {tuple(W.shape)} in {W.dtype}; both must agree."
        )
    with torch.cuda.device(W.device):
        _EXTENSION.sparse_copy_cuda(
            out.data_ptr(), out.stride(0), W.data_ptr(), W.stride(0), DTYPES[W.dtype], *W.shape, index.data_ptr(), values.data_ptr(),
            index.shape[1], _stream(),
        )  # fmt: skip
    return out


def put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W[row_k, col_k] += values[k] in place, in fp32 and rounded once; returns what was there, [nnz] in W's dtype."""
    _check("put", index, matrices={"W": W}, vectors={"values": (values, torch.float32)})
    saved = torch.empty(index.shape[1], dtype=W.dtype, device=W.device)
    with torch.cuda.device(W.device):
        _EXTENSION.sparse_put_cuda(
            W.data_ptr(),
            W.stride(0),
            DTYPES[W.dtype],
            index.data_ptr(),
            values.data_ptr(),
            saved.data_ptr(),
            index.shape[1],
            _stream(),
        )
    return saved


def restore(W: Tensor, index: Tensor, saved: Tensor) -> None:
    """W[row_k, col_k] = saved[k], bit for bit; saved [nnz] as `put` returned it."""
    _check("restore", index, matrices={"W": W}, vectors={"saved": (saved, W.dtype)})
    with torch.cuda.device(W.device):
        _EXTENSION.sparse_restore_cuda(
            W.data_ptr(),
            W.stride(0),
            DTYPES[W.dtype],
            index.data_ptr(),
            saved.data_ptr(),
            index.shape[1],
            _stream(),
        )


def _columns(m: Tensor) -> Tensor:
    """m [tokens, cols] transposed, [cols, tokens], zero up to a multiple of _PAD tokens."""
    tokens, cols = m.shape
    to = m.new_empty((cols, (tokens + _PAD - 1) // _PAD * _PAD))
    _EXTENSION.sparse_columns_cuda(
        to.data_ptr(), to.shape[1], m.data_ptr(), m.stride(0), DTYPES[m.dtype], tokens, cols, _stream()
    )
    return to


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def _check(
    who: str,
    index: Tensor,
    matrices: dict[str, Tensor],
    vectors: dict[str, tuple[Tensor, torch.dtype]] | None = None,
) -> None:
    device = index.device
    if index.dtype is not torch.int32 or index.dim() != 2 or index.shape[0] != 2 or not index.is_contiguous():
        raise ValueError(
            f"sparse_cuda.{who}: index is {tuple(index.shape)} in {index.dtype} with strides {index.stride()}; it must be int32 [2, nnz], "
            "rows then columns, contiguous."
        )
    for name, m in matrices.items():
        if m.dim() != 2 or m.dtype not in DTYPES or m.stride(1) != 1:
            raise ValueError(
                f"sparse_cuda.{who}: {name} is {tuple(m.shape)} in {m.dtype} with strides {m.stride()}; it must be two-dimensional, in "
                "float32, bfloat16 or float16, with columns of stride 1."
            )
    for name, (v, dtype) in (vectors or {}).items():
        if tuple(v.shape) != (index.shape[1],) or v.dtype is not dtype or not v.is_contiguous():
            raise ValueError(
                f"sparse_cuda.{who}: {name} is {tuple(v.shape)} in {v.dtype} for {index.shape[1]} entries; it must be "
                f"({index.shape[1]},) in {dtype}, contiguous."
            )
    tensors = {"index": index} | matrices | {name: v for name, (v, _) in (vectors or {}).items()}
    if device.type != "cuda" or any(t.device != device for t in tensors.values()):
        found = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(
            f"sparse_cuda.{who}: {found}; all must be on one CUDA device; on the CPU use fastpeft.ops.sparse_cpu."
        )
    if not built():
        raise RuntimeError(
            f"sparse_cuda.{who}: fastpeft._C was built without CUDA; install fastpeft again with nvcc on the path."
        )
