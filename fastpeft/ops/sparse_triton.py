"""Sparse adapters in Triton: the gradient of listed entries, and W with values added at them, registered in torch.library.

index is contiguous int32 [2, nnz]: rows, then columns, strictly increasing in row-major order and inside the matrix. Shape,
dtype and layout are checked; the entries are trusted, because looking at them would wait for the device.

The product x S^T by itself has no kernel here: only the exact mode needs it, which PyTorch serves.
Operators with fake implementations and no autograd formula. CPU tensors run in Triton's interpreter
(TRITON_INTERPRET=1) and raise otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.launch import check, check_dtype, kernels
from fastpeft.ops.library import register

ROUTES = ("sddmm", "tile")
# Share of listed entries from which the whole product by tiles is quicker than one dot product an entry. The estimate of a
# model of an H100 (bytes read from its cache against the time of one GEMM), unmeasured.
TILE_FROM = 0.003


def grad(
    dz: Tensor, x: Tensor, index: Tensor, dtype: torch.dtype = torch.float32, route: str | None = None
) -> Tensor:
    """(dz^T x)[index], [nnz] in `dtype`, summed in fp32; dz [t, out], x [t, in] in any dtypes and strides of their own.

    route: "sddmm" takes one dot product an entry and copies dz and x; "tile" makes the whole product, of which only the
    entries reach memory. None: by the share of entries. Raises ValueError for another route or an index of another form.
    """
    check_dtype("sparse grad", "dtype", dtype)
    return _GRAD(dz, x, index, _route(dz, x, index) if route is None else route).to(dtype)


def copy(W: Tensor, values: Tensor, index: Tensor, out: Tensor) -> None:
    """out = W, and W + values at the entries, added in fp32; W, out [out, in] of one dtype, values [nnz]."""
    _COPY(W, values, index, out)


def put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """W += values at the entries, in place, added in fp32; what W held there, [nnz] in W's dtype, for `restore`."""
    return _PUT(W, values, index)


def restore(W: Tensor, index: Tensor, saved: Tensor) -> None:
    """W = saved at the entries, in place, bit for bit; saved [nnz] in W's dtype."""
    _RESTORE(W, index, saved)


def _route(dz: Tensor, x: Tensor, index: Tensor) -> str:
    return "tile" if index.shape[-1] >= TILE_FROM * dz.shape[-1] * x.shape[-1] else "sddmm"


def _check_index(who: str, index: Tensor, like: Tensor) -> None:
    if index.dtype != torch.int32 or index.dim() != 2 or index.shape[0] != 2 or not index.is_contiguous():
        raise ValueError(
            f"{who}: index is {index.dtype} of shape {tuple(index.shape)}"
            f"{'' if index.is_contiguous() else ', not contiguous'}; it must be contiguous int32 [2, nnz], rows before "
            "columns; call index.to(torch.int32).contiguous()."
        )
    if index.device != like.device:
        raise RuntimeError(f"{who}: index is on {index.device}, the matrix on {like.device}; move one of them.")
    if index.shape[1] >= 2**31:
        raise ValueError(f"{who}: {index.shape[1]} entries, and kernels count in 32 bits; train W whole instead.")


def _check_dtypes(who: str, W: Tensor, name: str, other: Tensor) -> None:
    if other.dtype != W.dtype:
        raise TypeError(f"{who}: {name} is {other.dtype} and W is {W.dtype}; make {name} with W's dtype.")


def _run_grad(dz: Tensor, x: Tensor, index: Tensor, route: str) -> Tensor:
    if route not in ROUTES:
        raise ValueError(f"sparse grad: route={route!r} does not exist; choose one of {', '.join(ROUTES)}.")
    _check_index("sparse grad", index, x)
    with check("sparse grad", dz=dz, x=x):
        family = kernels("sparse")
        return (family.masked if route == "tile" else family.sddmm)(dz, x, index)


def _run_copy(W: Tensor, values: Tensor, index: Tensor, out: Tensor) -> None:
    _check_index("sparse copy", index, W)
    _check_dtypes("sparse copy", W, "out", out)
    with check("sparse copy", W=W, values=values, out=out):
        kernels("sparse").copy(W, values, index, out)


def _run_put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    _check_index("sparse put", index, W)
    with check("sparse put", W=W, values=values):
        return kernels("sparse").put(W, values, index)


def _run_restore(W: Tensor, index: Tensor, saved: Tensor) -> None:
    _check_index("sparse restore", index, W)
    _check_dtypes("sparse restore", W, "saved", saved)
    with check("sparse restore", W=W, saved=saved):
        kernels("sparse").restore(W, index, saved)


def _fake_grad(dz: Tensor, x: Tensor, index: Tensor, route: str) -> Tensor:
    return x.new_empty((index.shape[1],), dtype=torch.float32)


def _fake_put(W: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return W.new_empty((index.shape[1],))


def _fake_nothing(*args: Tensor) -> None:
    return None


_OPERATORS = (
    ("triton_sparse_grad(Tensor dz, Tensor x, Tensor index, str route) -> Tensor", _run_grad, _fake_grad),
    (
        "triton_sparse_copy(Tensor W, Tensor values, Tensor index, Tensor(a!) out) -> ()",
        _run_copy,
        _fake_nothing,
    ),
    ("triton_sparse_put(Tensor(a!) W, Tensor values, Tensor index) -> Tensor", _run_put, _fake_put),
    (
        "triton_sparse_restore(Tensor(a!) W, Tensor index, Tensor saved) -> ()",
        _run_restore,
        _fake_nothing,
    ),
)
register(_OPERATORS, "CPU", "CUDA")

# looked up once: resolving torch.ops.fastpeft.<name> costs microseconds a call
_GRAD = torch.ops.fastpeft.triton_sparse_grad.default
_COPY = torch.ops.fastpeft.triton_sparse_copy.default
_PUT = torch.ops.fastpeft.triton_sparse_put.default
_RESTORE = torch.ops.fastpeft.triton_sparse_restore.default
