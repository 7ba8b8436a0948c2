"""Every Triton operator of the low-rank family and the norm: inputs of any layout, and each result beside
fp64 and plain PyTorch.

An operator's error may be twice that of the plain composition in the same dtype, plus one rounding of the
largest value; where factors are wider than x, the plain gradients of factors are summed in the factors'
dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpeft
from fastpeft.ops import lowrank_triton as ops
from fastpeft.ops.rownorm_triton import row_sq_norm_forward

SEED = 0x1234_5678_9ABC_DEF0
SCALE = 0.37
FAR = 2**30 + 8


class Case(NamedTuple):
    """layout: of x, z, dz and W: "plain", "transposed", "sliced" (every other column of a wider tensor), or
    "far": rows of x, z and dz so far apart that the third begins past 2**31 elements.
    """

    tokens: int
    in_features: int
    out_features: int
    blocks: int
    rank: int
    dtype: torch.dtype
    factor: torch.dtype
    p: float = 0.0
    layout: str = "plain"


@dataclass
class Inputs:
    """x [t, i], z, dz [t, o], u, v [t, n r], A, B by blocks if n > 1, gain, bias [o], W [o, i]."""

    case: Case
    x: Tensor
    z: Tensor
    dz: Tensor
    u: Tensor
    v: Tensor
    A: Tensor
    B: Tensor
    gain: Tensor
    bias: Tensor
    W: Tensor
    seed: Tensor | None

    @property
    def mask(self) -> Tensor | None:
        """[t, i], 0 or 1 / (1 - p), in fp64."""
        return None if self.seed is None else fastpeft.dropout_mask(self.seed, self.x.shape, self.case.p)

    @property
    def how(self) -> dict[str, Any]:
        return {"seed": self.seed, "p": self.case.p, "blocks": self.case.blocks}

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.case.dtype, self.case.factor)


def lay(t: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    rows, cols = t.shape
    if layout == "transposed":
        return t.T.contiguous().T
    if layout == "sliced":
        around = torch.full((rows + 2, 2 * cols + 3), float("nan"), dtype=t.dtype, device=t.device)
        around[1 : rows + 1, 2 : 2 + 2 * cols : 2] = t
        return around[1 : rows + 1, 2 : 2 + 2 * cols : 2]
    if layout == "far":
        memory = torch.empty((rows - 1) * FAR + cols, dtype=t.dtype, device=t.device)
        return memory.as_strided((rows, cols), (FAR, 1)).copy_(t)
    return t


def make(case: Case, device: str) -> Inputs:
    """Values of order one, equal for equal cases."""
    torch.manual_seed(0)
    t, i, o, n, r = case[:5]

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    A, B = normal(n, r, i // n, dtype=case.factor), normal(n, o // n, r, dtype=case.factor)
    A, B = (A[0], B[0]) if n == 1 else (A, B)
    seed = torch.tensor(SEED, device=device) if case.p else None
    return Inputs(
        case, lay(normal(t, i), case.layout), lay(normal(t, o), case.layout), lay(normal(t, o), case.layout),
        normal(t, n * r), normal(t, n * r), A, B, normal(o, dtype=case.factor), normal(o, dtype=case.factor),
        normal(o, i) if case.layout == "far" else lay(normal(o, i), case.layout), seed,
    )  # fmt: skip


def dense(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 2 else torch.block_diag(*factor)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def outer(like: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left^T right of the shape of a factor: block k of the columns of both."""
    if like.dim() == 2:
        return left.T @ right
    n = like.shape[0]
    return torch.stack([a.T @ b for a, b in zip(left.chunk(n, 1), right.chunk(n, 1), strict=True)])


# an operator's outputs by name, and for each the formula, its tensors, and the dtype of the plain composition
Outputs = dict[str, Tensor]
Formula = tuple[Callable[..., Tensor], dict[str, Tensor | None], torch.dtype]


def down(m: Inputs) -> Outputs:
    return {"u": ops.down(m.x, m.A, m.case.dtype, **m.how)}


def up(m: Inputs) -> Outputs:
    return {"z": ops.up(m.v, m.B, SCALE, m.case.blocks, m.bias)}


def up_add(m: Inputs) -> Outputs:
    z = lay(m.z.clone(), m.case.layout)
    ops.up_add(z, m.v, m.B, SCALE, m.case.blocks)
    return {"z": z}


def up_add_gain(m: Inputs) -> Outputs:
    z = lay(m.z.clone(), m.case.layout)
    y = ops.up_add_gain(z, m.v, m.B, SCALE, m.case.blocks, m.gain, m.bias)
    return {"z": z, "y": y}


def du(m: Inputs) -> Outputs:
    got, _ = ops.du_db(m.dz, None, m.B, SCALE, m.case.blocks, need_du=True, need_db=False)
    return {"du": got}


def du_db(m: Inputs) -> Outputs:
    got = ops.du_db(m.dz, m.v, m.B, SCALE, m.case.blocks, need_du=True, need_db=True)
    return dict(zip(("du", "dB"), got, strict=True))


def du_db_gain(m: Inputs) -> Outputs:
    got = ops.du_db_gain(
        m.dz, m.z, m.v, m.B, SCALE, m.case.blocks, m.gain, need_du=True, need_db=True, need_dgain=True
    )
    return dict(zip(("dz", "du", "dB", "dgain"), got, strict=True))


def dx(m: Inputs) -> Outputs:
    return {"dx": ops.dx(m.u, m.A, **m.how)}


def dx_add(m: Inputs) -> Outputs:
    got = lay(m.x.clone(), m.case.layout)
    ops.dx_add(got, m.u, m.A, **m.how)
    return {"dx": got}


def da(m: Inputs) -> Outputs:
    return {"dA": ops.da(m.x, m.u, m.A, **m.how)}


def row_sq_norm(m: Inputs) -> Outputs:
    return {"norm": row_sq_norm_forward(m.W, m.A, m.B)}


OPERATORS: dict[str, Callable[[Inputs], Outputs]] = {
    f.__name__: f for f in (down, up, up_add, up_add_gain, du, du_db, du_db_gain, dx, dx_add, da, row_sq_norm)
}
DROPS = ("down", "dx", "dx_add", "da")


def formulas(name: str, m: Inputs) -> dict[str, Formula]:
    dtype, A, B = m.case.dtype, dense(m.A), dense(m.B)
    written = lambda z, v, B: z + SCALE * (v @ B.T)  # noqa: E731
    match name:
        case "down":
            return {"u": (lambda x, k, A: masked(x, k) @ A.T, {"x": m.x, "k": m.mask, "A": A}, dtype)}
        case "up":
            return {"z": (lambda v, B, b: SCALE * (v @ B.T) + b, {"v": m.v, "B": B, "b": m.bias}, dtype)}
        case "up_add":
            return {"z": (written, {"z": m.z, "v": m.v, "B": B}, dtype)}
        case "up_add_gain":
            return {
                "z": (written, {"z": m.z, "v": m.v, "B": B}, dtype),
                "y": (
                    lambda z, v, B, g, b: written(z, v, B) * g + b,
                    {"z": m.z, "v": m.v, "B": B, "g": m.gain, "b": m.bias},
                    dtype,
                ),
            }
        case "du" | "du_db":
            return {
                "du": (lambda d, B: SCALE * (d @ B), {"d": m.dz, "B": B}, dtype),
                "dB": (lambda d, v: SCALE * outer(m.B, d, v), {"d": m.dz, "v": m.v}, m.wide),
            }
        case "du_db_gain":
            return _gain_formulas(m, B)
        case "dx":
            return {"dx": (lambda u, k, A: masked(u @ A, k), {"u": m.u, "k": m.mask, "A": A}, dtype)}
        case "dx_add":
            own = {"x": m.x, "u": m.u, "k": m.mask, "A": A}
            return {"dx": (lambda x, u, k, A: x + masked(u @ A, k), own, dtype)}
        case "da":
            own = {"x": m.x, "k": m.mask, "u": m.u}
            return {"dA": (lambda x, k, u: outer(m.A, u, masked(x, k)), own, m.wide)}
    return {"norm": (lambda W, A, B: (W + B @ A).square().sum(1), {"W": m.W, "A": A, "B": B}, torch.float32)}


def _gain_formulas(m: Inputs, B: Tensor) -> dict[str, Formula]:
    """dz is rounded to its dtype before it meets v, in the plain composition as in the kernel; dgain is a dot
    product.
    """
    dtype = m.case.dtype

    def grad_b(d: Tensor, v: Tensor, g: Tensor) -> Tensor:
        dz = d * g if d.dtype == torch.float64 else (m.dz * m.gain.to(dtype)).to(d.dtype)
        return SCALE * outer(m.B, dz, v)

    return {
        "dz": (lambda d, g: d * g, {"d": m.dz, "g": m.gain}, dtype),
        "du": (lambda d, g, B: SCALE * ((d * g) @ B), {"d": m.dz, "g": m.gain, "B": B}, dtype),
        "dB": (grad_b, {"d": m.dz, "v": m.v, "g": m.gain}, m.wide),
        "dgain": (lambda d, z: torch.einsum("to,to->o", d, z), {"d": m.dz, "z": m.z}, m.gain.dtype),
    }


def wrong(name: str, m: Inputs, got: Outputs) -> tuple[float, list[str]]:
    """Largest error relative to the largest value of its output, and what is wrong, by output."""
    wanted = formulas(name, m)
    worst, found = 0.0, []
    for output, tensor in got.items():
        formula, tensors, plain_dtype = wanted[output]
        truth, plain = (
            formula(**{k: None if t is None else t.to(d) for k, t in tensors.items()})
            for d in (torch.float64, plain_dtype)
        )
        error, allowed = ((t.double() - truth).abs().max().item() for t in (tensor, plain))
        size = truth.abs().max().item()
        worst = max(worst, error / max(size, 1e-300))
        if not error <= 2 * allowed + torch.finfo(tensor.dtype).eps * size:
            found.append(f"{output}: error {error:.1e}, plain {allowed:.1e}, largest {size:.1e}")
    return worst, found
