"""Is an arm right: its y and every gradient against the paper's formula in fp64, computed by autograd.

An error may be twice that of the same formula in the layer's dtype, plus one rounding of the largest value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastpeft
from bench.arms import Arm
from fastpeft.ops.dropout import draw_seed

SEED = 20240229


def low_rank(method: str, x: Tensor, mask: Tensor | None, factors: dict[str, Tensor], scale: float) -> Tensor:
    """scale * (drop(x) A^T) B^T; by blocks where A has three dimensions, with a router for hydralora."""
    A, B = factors["A"], factors["B"]
    dropped = x if mask is None else x * mask
    if A.dim() == 3:
        parts = [c @ a.T @ b.T for c, a, b in zip(dropped.chunk(len(A), 1), A, B, strict=True)]
        return scale * torch.cat(parts, 1)
    u = dropped @ A.T
    if method == "hydralora":
        u = (torch.softmax(x @ factors["G"].T, -1)[:, :, None] * u[:, None, :]).flatten(1)
    return scale * (u @ B.T)


def dense(method: str, f: dict[str, Tensor]) -> Tensor | None:
    """The update [out, in] without its scale, of a method whose update the paper states as a matrix."""
    if method == "loha":
        return (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
    if method == "lokr":
        w1, w2 = (f[n] if n in f else f[f"{n}_a"] @ f[f"{n}_b"] for n in ("w1", "w2"))
        return torch.einsum("ac,bd->abcd", w1, w2).reshape(len(w1) * len(w2), -1)
    if method == "krona":
        return torch.einsum("ca,db->abcd", f["A"], f["B"]).reshape(f["A"].shape[1] * f["B"].shape[1], -1)
    return None


def formula(arm: Arm, x: Tensor, dy: Tensor, dtype: torch.dtype, mask: Tensor | None) -> dict[str, Tensor]:
    """y, dx and the gradient of each of the adapter's parameters, in `dtype`.

    DoRA is in its authors' form, its norm held constant. mask [tokens, in]: 0 or 1 / (1 - p).
    """
    frozen: Any = getattr(arm.layer, "base_layer", arm.layer)
    W, b = frozen.weight.detach().to(dtype), frozen.bias.detach().to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    mask = None if mask is None else mask.to(dtype)
    p = {name: t.to(dtype).requires_grad_() for name, t in arm.start.items()}
    y = x @ W.T
    if arm.method is not None:
        delta = dense(arm.method, p)
        if delta is None:
            low = low_rank(arm.method, x, mask, p, arm.scale)
        else:
            low = arm.scale * (x @ delta.T)
        if arm.method == "dora":
            g = p["m"] / (W + arm.scale * (p["B"] @ p["A"])).detach().norm(dim=1)
            low = (g - 1) * (y if mask is None else (x * mask) @ W.T) + g * low
        y = y + low
    y = y + b
    grads = torch.autograd.grad(y, [x, *p.values()], dy.to(dtype))
    return dict(zip(("y", "dx", *(f"d{name}" for name in p)), (y.detach(), *grads), strict=True))


def measured(arm: Arm, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """What the arm itself gives, under the same names, and the dropout mask that it used."""
    with arm.using(), _watched(arm, x) as mask:
        y = arm.forward(x)
        grads = torch.autograd.grad(y, [x, *arm.parameters.values()], dy)
    names = ("y", "dx", *(f"d{name}" for name in arm.parameters))
    return dict(zip(names, (y.detach(), *grads), strict=True)), mask[0] if mask else None


@contextlib.contextmanager
def _watched(arm: Arm, x: Tensor) -> Iterator[list[Tensor]]:
    """The mask of the run inside, once it is over: fastpeft's from its seed, PEFT's from what its Dropout let
    through.
    """
    found: list[Tensor] = []
    if not arm.dropout:
        yield found
        return
    torch.manual_seed(SEED)
    if arm.library != "PEFT":
        mask = (
            arm.layer.mask(x)
            if arm.library == "hand"
            else fastpeft.dropout_mask(draw_seed(x.device), x.shape, arm.dropout)
        )
        found.append(mask)
        torch.manual_seed(SEED)
        yield found
        return
    keep = lambda module, inputs, out: found.append((out != 0).double() / (1 - arm.dropout))  # noqa: E731
    handle = arm.layer.lora_dropout["default"].register_forward_hook(keep)  # type: ignore[index, union-attr]
    try:
        yield found
    finally:
        handle.remove()


def distance(
    got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor]
) -> tuple[float, list[str]]:
    """Largest error relative to the largest value of its tensor, and the names of those whose error is too
    large.
    """
    worst, wrong = 0.0, []
    for name, want in truth.items():
        error, allowed = ((v[name].double() - want).abs().max().item() for v in (got, plain))
        size = want.abs().max().item()
        worst = max(worst, error / max(size, 1e-300))
        # a NaN is not smaller
        if not error <= 2 * allowed + torch.finfo(plain[name].dtype).eps * size:
            wrong.append(name)
    return worst, wrong


def check(arm: Arm, x: Tensor, dy: Tensor, known: dict[Any, Any] | None = None) -> tuple[float, list[str]]:
    """distance() of the arm. known: kept between arms, so that equal truths without dropout are computed
    once.
    """
    got, mask = measured(arm, x, dy)
    key = id(next(iter(arm.start.values()))) if arm.start else None
    known = {} if known is None or mask is not None else known
    if key not in known:
        known[key] = tuple(formula(arm, x, dy, d, mask) for d in (torch.float64, x.dtype))
    return distance(got, *known[key])
