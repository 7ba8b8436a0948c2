"""Every operator of the families kron and hadamard: inputs of any layout, and each result beside fp64 and plain PyTorch.

The truth is the dense product with the whole update and its autograd, in fp64. The yardstick is what one would write with
PyTorch's products in the same dtype: an operator's error may be twice its, plus one rounding of the largest value. Where
factors are wider than dz, the plain gradients of factors are summed in the factors' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.operators import SCALE, lay
from bench.machine import name_of

NAMES = {"kron": ("dC", "dD"), "hadamard": ("da1", "da2", "db1", "db2")}
Outputs = dict[str, Tensor]


class Case(NamedTuple):
    """size: kron a, b, c, d; hadamard in, out, rank; sparse in, out, entries.   dtype: of y and dz.   factor: of the
    factors or values.   x: of x where it is another than y's, as under autocast.   layout: as in bench.gpu.operators.
    """

    family: str
    tokens: int
    size: tuple[int, ...]
    dtype: torch.dtype
    factor: torch.dtype
    layout: str = "plain"
    x: torch.dtype | None = None

    def __str__(self) -> str:
        size = ", ".join(map(str, self.size))
        wide = "" if self.x is None else f" x {name_of(self.x)}"
        return f"[{self.tokens}; {size}] {name_of(self.dtype)}/{name_of(self.factor)}{wide} {self.layout}"


@dataclass
class Inputs:
    """x [t, in], dz [t, out], the family's tensors, bias [out]; z [t, out] is what an `add` adds to."""

    case: Case
    x: Tensor
    dz: Tensor
    z: Tensor
    tensors: tuple[Tensor, ...]
    bias: Tensor

    @property
    def every(self) -> tuple[bool, ...]:
        return (True,) * len(self.tensors)


def sizes(case: Case) -> tuple[int, int]:
    """in, out"""
    if case.family == "kron":
        a, b, c, d = case.size
        return c * d, a * b
    return case.size[0], case.size[1]


def make(case: Case, device: str) -> Inputs:
    """Values that leave x, y and both middles of order one, equal for equal cases."""
    torch.manual_seed(0)
    t, (i, o) = case.tokens, sizes(case)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    if case.family == "kron":
        a, b, c, d = case.size
        shapes, spread = [(a, c), (b, d)], [c**-0.5, d**-0.5]
    else:
        r = case.size[2]
        shapes, spread = [(r, i), (r, i), (o, r), (o, r)], [r**-0.5] * 4
    # factors of their own strides only beside a small x: a "far" one would take gigabytes each
    own = "plain" if case.layout == "far" else case.layout
    tensors = tuple(
        lay((torch.randn(*s, device=device) * size).to(case.factor), own)
        for s, size in zip(shapes, spread, strict=True)
    )
    x = lay(normal(t, i, dtype=case.x or case.dtype), case.layout)
    dz, z = lay(normal(t, o), case.layout), lay(normal(t, o), case.layout)
    return Inputs(case, x, dz, z, tensors, normal(o, dtype=case.factor))


def fresh(m: Inputs, code: Any) -> Outputs:
    return {"y": code.fresh(m.x, m.tensors, SCALE, m.bias)}


def add(m: Inputs, code: Any) -> Outputs:
    y = lay(m.z.clone(), m.case.layout)
    code.add(y, m.x, m.tensors, SCALE)
    return {"y": y}


def back(m: Inputs, code: Any) -> Outputs:
    dx, grads = code.back(m.dz, m.x, m.tensors, SCALE, None, True, m.every)
    return {"dx": dx} | dict(zip(NAMES[m.case.family], grads, strict=True))


def back_add(m: Inputs, code: Any) -> Outputs:
    """dx onto a given one, with all gradients; then without any, and so without x."""
    outputs = {}
    for name, needs in (("dx", m.every), ("dx alone", (False,) * len(m.tensors))):
        given = lay(m.x.to(m.case.dtype, copy=True), m.case.layout)
        x = m.x if any(needs) else None
        dx, grads = code.back(m.dz, x, m.tensors, SCALE, given, True, needs)
        outputs[name] = dx
        outputs |= {n: g for n, g in zip(NAMES[m.case.family], grads, strict=True) if g is not None}
    return outputs


def alone(m: Inputs, code: Any) -> Outputs:
    """Each gradient from a call that asks for nothing else, which may take another kernel."""
    outputs = {}
    for k, name in enumerate(NAMES[m.case.family]):
        needs = tuple(n == k for n in range(len(m.tensors)))
        dx, grads = code.back(m.dz, m.x, m.tensors, SCALE, None, False, needs)
        if dx is not None or any((g is None) == n for g, n in zip(grads, needs, strict=True)):
            raise AssertionError(f"{name} was asked for, and something else came")
        outputs[name] = grads[k]
    return outputs


OPERATORS: dict[str, Callable[[Inputs, Any], Outputs]] = {
    f.__name__: f for f in (fresh, add, back, back_add, alone)
}


def exact(m: Inputs) -> Outputs:
    """y without bias, dx and every gradient in fp64; x in dz's dtype first, as a layer under autocast has it."""
    x = m.x.to(m.case.dtype).double().requires_grad_()
    f = [t.double().requires_grad_() for t in m.tensors]
    if m.case.family == "kron":
        C, D = f
        delta = torch.einsum("ac,bd->abcd", C, D).reshape(len(C) * len(D), -1)
    else:
        a1, a2, b1, b2 = f
        delta = (b1 @ a1) * (b2 @ a2)
    y = SCALE * (x @ delta.T)
    grads = torch.autograd.grad(y, [x, *f], m.dz.double())
    return dict(zip(("y", "dx", *NAMES[m.case.family]), (y.detach(), *grads), strict=True))


def plain(m: Inputs) -> Outputs:
    """The same by PyTorch's products."""
    values = _plain_kron(m) if m.case.family == "kron" else _plain_hadamard(m)
    names = NAMES[m.case.family]
    grads = {n: g.to(t.dtype) for n, g, t in zip(names, values[2:], m.tensors, strict=True)}
    return {"y": values[0], "dx": values[1]} | grads


def _plain_kron(m: Inputs) -> tuple[Tensor, ...]:
    (a, c), (b, d) = (t.shape for t in m.tensors)
    C, D = (t.to(m.case.dtype) for t in m.tensors)
    x, dz = m.x.to(m.case.dtype).unflatten(1, (c, d)), m.dz.unflatten(1, (a, b))
    h, e = x @ D.T, C.T @ dz
    wide = torch.promote_types(m.case.dtype, m.case.factor)
    dC = SCALE * torch.einsum("tik,tjk->ij", dz.to(wide), h.to(wide))
    dD = SCALE * torch.einsum("tjk,tjl->kl", e.to(wide), x.to(wide))
    return SCALE * (C @ h).flatten(1), SCALE * (e @ D).flatten(1), dC, dD


def _plain_hadamard(m: Inputs) -> tuple[Tensor, ...]:
    a1, a2, b1, b2 = m.tensors
    r, dtype = len(a1), m.case.dtype
    A = (a1[:, None] * a2).flatten(0, 1).to(dtype)
    B = (b1[:, :, None] * b2[:, None]).flatten(1).to(dtype)
    x = m.x.to(dtype)
    u, du = x @ A.T, SCALE * (m.dz @ B)
    wide = torch.promote_types(dtype, m.case.factor)
    dA = (du.to(wide).T @ x.to(wide)).unflatten(0, (r, r))
    dB = (SCALE * (m.dz.to(wide).T @ u.to(wide))).unflatten(1, (r, r))
    grads = (
        (dA * a2).sum(1),
        (dA * a1[:, None]).sum(0),
        (dB * b2[:, None]).sum(2),
        (dB * b1[:, :, None]).sum(1),
    )
    return SCALE * (u @ B.T), du @ A, *grads


def wrong(name: str, m: Inputs, got: Outputs) -> tuple[float, list[str]]:
    """Largest error relative to the largest value of its output, and what is wrong, by output."""
    truth, yardstick = exact(m), plain(m)
    onto = {
        "fresh": {"y": m.bias.to(m.case.factor)},
        "add": {"y": m.z},
        "back_add": {"dx": m.x.to(m.case.dtype)},
    }.get(name, {})
    worst, found = 0.0, []
    for output, tensor in got.items():
        key = output.removesuffix(" alone")
        want, near = truth[key], yardstick[key]
        if key in onto:
            want, near = want + onto[key].double(), near + onto[key].to(near.dtype)
        error, faults = compared(output, tensor, want, near)
        worst, found = max(worst, error), found + faults
    return worst, found


def compared(output: str, got: Tensor, want: Tensor, near: Tensor) -> tuple[float, list[str]]:
    """The error relative to the largest value of `want`, and what is wrong; near: plain PyTorch's."""
    if got.shape != near.shape or got.dtype != near.dtype:
        return float("inf"), [f"{output}: {got.dtype} {list(got.shape)}, not {near.dtype} {list(near.shape)}"]
    if not got.numel():
        return 0.0, []
    error, allowed = ((t.double() - want).abs().max().item() for t in (got, near))
    size = want.abs().max().item()
    # a NaN is not smaller
    right = error <= 2 * allowed + torch.finfo(got.dtype).eps * size
    fault = f"{output}: error {error:.1e}, plain {allowed:.1e}, largest {size:.1e}"
    return error / max(size, 1e-300), [] if right else [fault]
