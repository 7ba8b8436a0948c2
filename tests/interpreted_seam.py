"""Whole layers with impl="triton" in Triton's interpreter; run by test_interpreter.py in a process of its own.

The compositions of test_seam.py: several terms, shared factors, middles, blocks, dropouts, gains. fp32 and fp16 only: the
interpreter's tl.dot multiplies the bit patterns of bf16. Truth: the dense formula in fp64.
"""

from __future__ import annotations

import dataclasses
import itertools

import papers
import pytest
import test_seam
import torch
from interpreted_lowrank import filled
from test_seam import CASES, GAIN, LOW_RANK, SEED, problem
from thinned import thinned
from tolerance import assert_as_good

import fastpeft
from fastpeft.ops import launch, lowrank_triton, steps
from fastpeft.terms import Bias, Gain, LowRank

F32, F16 = torch.float32, torch.float16
kernels = launch.kernels("lowrank")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """NaN in every buffer, and as many partial sums as there are tiles."""
    assert launch.interpreting()
    monkeypatch.setattr(kernels.memory, "empty", lambda *a: filled(float("nan"), *a))
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    monkeypatch.setattr(steps, "ONE_PASS", 0)  # as for large layers: the adapter first


@pytest.fixture
def launched(monkeypatch):
    """Names of the operators that ran: a fallback would show."""
    names = []
    for name in ("down", "up", "up_add", "up_add_gain", "du_db", "du_db_gain", "dx", "dx_add", "da"):
        real = getattr(lowrank_triton, name)
        monkeypatch.setattr(lowrank_triton, name, lambda *a, real=real, name=name, **k: (names.append(name), real(*a, **k))[1])
    return names


def cast(terms, leaves, dtype, factors):
    """The same terms on leaves in other dtypes, and those leaves by name."""
    by_id = {id(t): t.detach().to(dtype if n == "x" else factors).requires_grad_() for n, t in leaves.items()}
    made = {n: by_id[id(t)] for n, t in leaves.items()}
    out = []
    for t in terms:
        fields = {f.name: by_id.get(id(getattr(t, f.name))) for f in dataclasses.fields(t)}
        out.append(dataclasses.replace(t, **{k: v for k, v in fields.items() if v is not None}))
    assert all(isinstance(t, (LowRank, Gain, Bias)) for t in out)
    return made, out


def composed(x, W, b, terms):
    """What a user of PyTorch would write, in x's dtype; autograd keeps the gradients of fp32 leaves in fp32."""
    low = lambda t: None if t is None else t.to(x.dtype)  # noqa: E731
    lows = [t for t in terms if isinstance(t, LowRank)]
    gain = next((t for t in terms if isinstance(t, Gain)), None)
    mask = lambda p: fastpeft.dropout_mask(SEED, x.shape, p).to(x.dtype) if p else None  # noqa: E731
    added = [
        papers.low_rank(x, low(t.A), low(t.B), t.scale, mask(t.dropout), t.mid, low(t.rows), t.post, t.blocks) for t in lows
    ]
    g, gain_mask = (None, None) if gain is None else (low(gain.g), mask(gain.dropout))
    return papers.site(x, W, b, added, g, gain_mask, [low(t.b) for t in terms if isinstance(t, Bias)])


def with_gradients(y, leaves, d):
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), d.to(y.dtype))]


# `post` runs in torch; a cube magnifies whose rounding of u was the luckier one, and says nothing of a kernel
SWEEP = [(name, gain, dtype) for (name, gain), dtype in itertools.product(CASES, (F32, F16)) if name != "post"]


@pytest.mark.parametrize(("name", "gain", "dtype"), thinned(SWEEP))
def test_equals_the_dense_formula(name, gain, dtype, launched, monkeypatch):
    # enough numbers that the largest error of plain PyTorch is no accident
    monkeypatch.setattr(test_seam, "IN", 48)
    monkeypatch.setattr(test_seam, "OUT", 70)
    leaves, W, b, terms, dense = problem(LOW_RANK[name], GAIN[gain], (3, 11))
    want = dense()
    d = torch.randn_like(want)
    truth = [want.detach(), *torch.autograd.grad(want, list(leaves.values()), d)]
    made, own = cast(terms, leaves, dtype, F32)
    W, b = W.to(dtype), b.to(dtype)
    ours = with_gradients(fastpeft.adapted_linear(made["x"], W, b, own, seed=SEED, impl="triton"), made, d)
    plain = with_gradients(composed(made["x"], W, b, own), made, d)
    assert {"down", "da"} <= set(launched) and ({"du_db", "du_db_gain"} & set(launched) or name.startswith("post"))
    for n, got, exact, reference in zip(("y", *leaves), ours, truth, plain, strict=True):
        assert_as_good(got, exact, reference, n)


@pytest.mark.parametrize("method", ["lora", "lora_fa", "dora", "melora", "hydralora", "dylora", "prolora"])
def test_methods(method, monkeypatch, launched):
    """A module, chosen by FASTPEFT_IMPL: forward and every gradient as good as torch's."""
    results = {}
    for impl, dtype in (("triton", F32), ("torch", F32), ("torch", torch.float64)):
        monkeypatch.setenv("FASTPEFT_IMPL", impl)
        torch.manual_seed(0)
        layer = fastpeft.AdaptedLinear(48, 36, method=method, rank=3)
        with torch.no_grad():
            for p in layer.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
        layer = layer.to(dtype)
        x, d = torch.randn(2, 9, 48).to(dtype).requires_grad_(), torch.randn(2, 9, 36).to(dtype)
        y = layer(x)
        own = [p for p in layer.parameters() if p.requires_grad]
        results[impl, dtype] = [y.detach(), *torch.autograd.grad(y, [x, *own], d)]
    assert "down" in launched
    for got, plain, want in zip(*results.values(), strict=True):
        assert_as_good(got, want, plain, method)


def test_two_methods_at_one_site_and_a_second_backward():
    """Terms of two methods; the graph is used twice."""
    torch.manual_seed(0)
    layer = fastpeft.AdaptedLinear(24, 20, method=["lora", "dora"], rank=2)
    x = torch.randn(5, 24, requires_grad=True)
    terms = layer.adapter.terms(fastpeft.base.Plain(layer.weight))
    y = fastpeft.adapted_linear(x, layer.weight, layer.bias, terms, impl="triton")
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


def test_fp64_is_refused():
    with pytest.raises(TypeError, match=r"float64.*impl='torch'"):
        fastpeft.adapted_linear(torch.randn(3, 8).double(), torch.randn(4, 8).double(), None, [
            LowRank(torch.randn(2, 8).double(), torch.randn(4, 2).double())
        ], impl="triton")  # fmt: skip


def last_tile_dropped(monkeypatch):
    monkeypatch.setattr(kernels.triton, "cdiv", lambda a, b: max(1, a // b))


def last_part_of_a_sum_dropped(monkeypatch):
    real = kernels._sum
    monkeypatch.setattr(kernels, "_sum", lambda parts, out, count: real(parts, out, max(1, count - 1)))


def blocks_shifted(monkeypatch):
    real = kernels._blocked
    monkeypatch.setattr(kernels, "_blocked", lambda factor: real(factor).roll(1, 0))


def mask_of_other_rows(monkeypatch):
    real = lowrank_triton.dx
    monkeypatch.setattr(lowrank_triton, "dx", lambda du, A, *, seed, p, blocks: real(du, A, seed=seed ^ 1, p=p, blocks=blocks))


def bias_forgotten(monkeypatch):
    real = lowrank_triton.up
    monkeypatch.setattr(lowrank_triton, "up", lambda v, B, scale, blocks, bias: real(v, B, scale, blocks, None))


def check_layer():
    """Ragged tiles, blocks, dropout, a bias: output and gradients as good as torch's."""
    torch.manual_seed(0)
    shapes = {"x": (70, 300), "A": (2, 5, 150), "B": (2, 135, 5)}
    leaves = {n: torch.randn(*s, dtype=torch.float64, requires_grad=True) for n, s in shapes.items()}
    W, b, d = torch.randn(270, 300).double(), torch.randn(270).double(), torch.randn(70, 270).double()
    results = []
    for dtype, impl in ((F32, "triton"), (torch.float64, "torch"), (F32, "torch")):
        own = {n: t.detach().to(dtype).requires_grad_() for n, t in leaves.items()}
        terms = [LowRank(own["A"], own["B"], 0.7, dropout=0.3, blocks=2)]
        y = fastpeft.adapted_linear(own["x"], W.to(dtype), b.to(dtype), terms, seed=SEED, impl=impl)
        results.append(with_gradients(y, own, d))
    for n, got, want, plain in zip(("y", "dx", "dA", "dB"), *results, strict=True):
        assert_as_good(got, want, plain, n)


def test_nothing_planted():
    check_layer()


FAULTS = [last_tile_dropped, last_part_of_a_sum_dropped, blocks_shifted, mask_of_other_rows, bias_forgotten]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda f: f.__name__)
def test_planted_fault_is_found(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check_layer()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_graph(method, monkeypatch):
    """torch.compile sees no break, and gives the bits of the eager call."""
    monkeypatch.setenv("FASTPEFT_IMPL", "triton")
    torch.manual_seed(0)
    layer = fastpeft.AdaptedLinear(24, 20, method=method, rank=3)
    x, results = torch.randn(5, 24), []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        xs = x.clone().requires_grad_()
        y = run(xs)
        results.append([y, *torch.autograd.grad(y.square().sum(), [xs, *[p for p in layer.parameters() if p.requires_grad]])])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
