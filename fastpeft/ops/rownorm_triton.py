"""||W + B A||^2 of each row in Triton: the forward of fastpeft/ops/rownorm.py, registered in torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops.launch import check, kernels
from fastpeft.ops.library import register


def row_sq_norm_forward(W: Tensor, A: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """W [out, in], A [R, in], B [out, R] -> [out] in fp32, in one pass over W; no autograd formula.

    Raises ValueError if only one of A and B is given.
    """
    if (A is None) != (B is None):
        raise ValueError("row_sq_norm: A and B come together; got only one of them.")
    return _FORWARD(W, A, B)


def _run(W: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
    with check("row_sq_norm", W=W, A=A, B=B):
        return kernels("dora").row_sq_norm(W, A, B)


def _fake(W: Tensor, A: Tensor | None, B: Tensor | None) -> Tensor:
    return W.new_empty((W.shape[0],), dtype=torch.float32)


register([("row_sq_norm_forward(Tensor W, Tensor? A, Tensor? B) -> Tensor", _run, _fake)], "CPU", "CUDA")

_FORWARD = torch.ops.fastpeft.row_sq_norm_forward.default
