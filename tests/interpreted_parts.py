"""Whole layers with Kronecker and Khatri-Rao terms on Triton kernels, through autograd; run under TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_as_good

from fastpeft.linear import adapted_linear
from fastpeft.ops import khatri_rao, khatri_rao_triton, kron, kron_triton
from fastpeft.ops.launch import interpreting, kernels
from fastpeft.terms import Gain, KhatriRao, Kron, LowRank
from fastpeft.terms import kron as kron_product

F32, F16 = torch.float32, torch.float16
T, OUT, IN = 33, 35, 40


def test_the_interpreter_runs():
    assert interpreting()


def test_the_rank_limit_is_the_kernels():
    assert khatri_rao_triton.RANKS == kernels("hadamard").tiles.HADAMARD_RANK


def terms(kind, leaves):
    """The term of each family over its leaves, and a low-rank term beside it."""
    if kind == "kron":
        return [Kron(leaves["C"], leaves["D"], 1.3)]
    if kind == "khatri":
        return [LowRank(KhatriRao(leaves["a1"], leaves["a2"]), KhatriRao(leaves["b1"], leaves["b2"]), 0.7)]
    both = [*terms("kron", leaves), *terms("khatri", leaves), LowRank(leaves["A"], leaves["B"], 0.5)]
    return both if kind == "all" else [*both, Gain(leaves["g"])]


def composed(kind, x, W, bias, leaves):
    total = x @ W.T
    if kind != "khatri":
        total = total + 1.3 * (x @ kron_product(leaves["C"], leaves["D"]).T)
    if kind != "kron":
        total = total + 0.7 * (x @ ((leaves["b1"] @ leaves["a1"]) * (leaves["b2"] @ leaves["a2"])).T)
    if kind in ("all", "gain"):
        total = total + 0.5 * ((x @ leaves["A"].T) @ leaves["B"].T)
    return (leaves["g"] * total if kind == "gain" else total) + bias


SHAPES = {"C": (5, 8), "D": (7, 5), "a1": (2, IN), "a2": (2, IN), "b1": (OUT, 2), "b2": (OUT, 2), "A": (3, IN), "B": (OUT, 3), "g": (OUT,)}
USED = {"kron": "CD", "khatri": ["a1", "a2", "b1", "b2"], "all": [n for n in SHAPES if n != "g"], "gain": list(SHAPES)}


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("kind", USED)
def test_layers(kind, dtype, monkeypatch):
    torch.manual_seed(2)
    monkeypatch.setattr(khatri_rao, "materialises", lambda *a: False)
    calls = []
    for module in (kron_triton, khatri_rao_triton):
        real = module.back
        monkeypatch.setattr(module, "back", lambda *a, real=real, m=module: (calls.append(m), real(*a))[1])
    for module in (kron, khatri_rao):
        for name in ("fresh", "add", "back"):
            monkeypatch.setattr(module, name, lambda *a: pytest.fail("the torch family ran"))
    x, W, bias, d = (torch.randn(s).to(dtype) for s in ((3, 11, IN), (OUT, IN), (OUT,), (3, 11, OUT)))
    start = {n: torch.randn(SHAPES[n]) / SHAPES[n][-1] ** 0.5 for n in USED[kind]}
    results = []
    for how, to in (("ours", dtype), ("exact", torch.float64), ("plain", dtype)):
        own = {n: t.to(F32 if how == "ours" else to).requires_grad_() for n, t in start.items()}
        leaf = x.to(to).requires_grad_()
        if how == "ours":
            y = adapted_linear(leaf, W, bias, terms(kind, own), impl="triton")
        else:
            y = composed(kind, leaf, W.to(to), bias.to(to), own)
        grads = torch.autograd.grad(y, [leaf, *own.values()], d.to(to))
        results.append([y, *grads])
    for name, got, exact, plain in zip(("y", "x", *start), *results, strict=True):
        # fp32 factors get fp32 gradients, which the plain composition in fp16 rounds
        assert_as_good(got.to(plain.dtype), exact, plain, f"{name} of {kind}")
    assert set(calls) == {kron_triton, khatri_rao_triton} if kind in ("all", "gain") else len(set(calls)) == 1
