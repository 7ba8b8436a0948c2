"""The grouped kernels in Triton's interpreter; run by test_interpreter.py in a process of its own.

fp32 and fp16 only: the interpreter's tl.dot multiplies the bit patterns of bf16. Every buffer is filled with NaN first.
Oracle: the token-by-token formula in fp64, and its autograd. Yardstick: the same in x's dtype.
"""

from __future__ import annotations

from types import SimpleNamespace

import papers
import pytest
import torch
from interpreted_lowrank import F16, F32, LAYOUTS, filled, lay
from tolerance import assert_as_good

from fastpeft import AdaptedLinear, grouping
from fastpeft.linear import adapted_linear
from fastpeft.ops import grouped, steps
from fastpeft.ops import grouped_triton as ops
from fastpeft.ops.launch import interpreting, kernels
from fastpeft.stack import Experts
from fastpeft.terms import Gain, Grouped, LowRank

kernel = kernels("grouped")
SCALE = 0.37
# tokens, in, out, ranks, k: everything ragged, an expert without ranks, several rank tiles; aligned ranks; one token; experts without
# a token
SHAPES = [
    (36, 20, 19, (3, 0, 20, 5), 2), (34, 40, 12, (40, 2), 2), (33, 32, 24, (16, 32), 1), (1, 5, 3, (2, 1), 2), (9, 24, 33, (4,) * 5, 2),
    (35, 8, 9, (5,), 1),
]  # fmt: skip
DTYPES = [(F32, F32), (F16, F16), (F16, F32)]


def _cases():
    """(shape, (dtype of x, dtype of factors), layout): all shapes, in fp32 and fp16 by turns; then every dtype and layout of one."""
    for n, shape in enumerate(SHAPES):
        yield shape, DTYPES[n % 2 * 2], LAYOUTS[n % 3]
    for n, layout in enumerate(LAYOUTS):
        yield (33, 11, 9, (5, 16, 3), 1), DTYPES[n], layout


def _name(case):
    (t, i, o, ranks, k), (x, factor), layout = case
    return f"{t}x{i}x{o}-{'.'.join(map(str, ranks))}-k{k}-{str(x)[6:]}-{str(factor)[6:]}-{layout}"


cases = pytest.mark.parametrize("case", list(_cases()), ids=_name)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert interpreting()
    monkeypatch.setattr(kernel.memory, "empty", lambda *a: filled(float("nan"), *a))


def make(case, weighted=True):
    (t, i, o, ranks, k), (dtype, factor), layout = case
    torch.manual_seed(0)
    x, dz = (lay(torch.randn(t, n).to(dtype), layout) for n in (i, o))
    A, B = (lay(torch.randn(*s).to(factor), layout) for s in ((sum(ranks), i), (o, sum(ranks))))
    index, w = torch.rand(t, len(ranks)).topk(k, -1)[1], torch.rand(t, k)
    own = [A, B, *grouped.segments(index, len(ranks)), *([w.reshape(-1)] if weighted else [])]
    return SimpleNamespace(
        x=x, dz=dz, A=A, B=B, w=w if weighted else torch.ones_like(w), index=index, own=own, ranks=ranks, dtype=dtype, layout=layout,
        family=ops.Family(ranks, k), o=o,
    )  # fmt: skip


def formula(m, dtype):
    """(update, dx, dA, dB, dw) in `dtype`."""
    x, A, B, w = (v.to(dtype).requires_grad_() for v in (m.x, m.A, m.B, m.w))
    y = papers.grouped(x, A, B, m.ranks, m.index, w, SCALE)
    return y.detach(), *torch.autograd.grad(y, (x, A, B, w), m.dz.to(dtype))


def as_good(got, want, plain, name):
    assert not got.isnan().any(), f"{name} holds NaN: differs by what memory held"
    assert_as_good(got.to(plain.dtype), want, plain, name)


@cases
def test_fresh_and_add(case):
    """What memory held before, here NaN, is neither read nor left anywhere."""
    m = make(case)
    y64, y = formula(m, torch.float64)[0], formula(m, m.dtype)[0]
    as_good(m.family.fresh(m.x, m.own, SCALE, None), y64, y, "y")
    bias = lay(torch.randn(m.o, 1).to(m.dtype), m.layout)[:, 0]
    as_good(m.family.fresh(m.x, m.own, SCALE, bias), y64 + bias.double(), y + bias, "y with bias")
    got = lay(m.dz.clone(), m.layout)
    assert m.family.add(got, m.x, m.own, SCALE) is None
    as_good(got, y64 + m.dz.double(), y + m.dz, "y added to")


@cases
def test_back(case):
    m = make(case)
    want, plain = formula(m, torch.float64), formula(m, m.dtype)
    dx, grads = m.family.back(m.dz, m.x, m.own, SCALE, None, True, (True, True, False, False, True))
    assert grads[2] is None is grads[3]
    assert [g.dtype for g in (grads[0], grads[1], grads[4])] == [m.A.dtype, m.B.dtype, F32]
    found = (dx, grads[0], grads[1], grads[4].view(m.w.shape))
    for name, got, w, p in zip(("dx", "dA", "dB", "dw"), found, want[1:], plain[1:], strict=True):
        as_good(got, w, p, name)
    given = lay(m.x.clone(), m.layout)
    assert m.family.back(m.dz, None, m.own, SCALE, given, True, (False,) * 5) == (given, (None,) * 5)
    as_good(given, m.x.double() + want[1], m.x + plain[1], "dx added to")


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("which", [0, 1, 4])
def test_one_gradient_alone(which, weighted):
    m = make((SHAPES[0], (F32, F32), "plain"), weighted)
    if which == 4 and not weighted:
        return
    want, plain = formula(m, torch.float64), formula(m, F32)
    needs = tuple([n == which for n in range(5 if weighted else 4)])
    dx, grads = m.family.back(m.dz, m.x, m.own, SCALE, None, False, needs)
    assert dx is None and [g is not None for g in grads] == list(needs)
    n = {0: 2, 1: 3, 4: 4}[which]
    as_good(grads[which].view(want[n].shape), want[n], plain[n], "gradient")


FIXED = {"none": [[2]] * 40, "all on rank 0": [[1]] * 40, "twice": [[2, 2]] * 40}


@pytest.mark.parametrize("name", FIXED)
def test_who_uses_whom(name):
    """All tokens on one expert, on one of rank 0, on one twice."""
    m = make(((40, 12, 10, (3, 0, 20, 5), len(FIXED[name][0])), (F32, F32), "plain"))
    m.index = torch.tensor(FIXED[name])
    m.own[2:4] = grouped.segments(m.index, 4)
    want, plain = formula(m, torch.float64), formula(m, F32)
    as_good(m.family.fresh(m.x, m.own, SCALE, None), want[0], plain[0], "y")
    dx, grads = m.family.back(m.dz, m.x, m.own, SCALE, None, True, (True, True, False, False, True))
    for got, w, p in zip((dx, grads[0], grads[1], grads[4].view(m.w.shape)), want[1:], plain[1:], strict=True):
        as_good(got, w, p, name)


def test_an_index_outside_adds_nothing():
    """On a GPU nobody can raise for it; its row is the bias alone."""
    m = make(((40, 12, 10, (3, 4), 1), (F32, F32), "plain"), weighted=False)
    m.index[5], m.index[6] = 2, -3
    m.own[2:4] = grouped.segments(m.index, 2)
    bias = torch.randn(10)
    got = m.family.fresh(m.x, m.own, SCALE, bias)
    m.index[5:7], m.w[5:7] = 0, 0.0
    as_good(got, formula(m, torch.float64)[0] + bias.double(), formula(m, F32)[0] + bias, "y")


def test_empty_and_rank_zero():
    for t, ranks in ((0, (2, 3)), (5, (0, 0))):
        m = make(((t, 12, 10, ranks, 1), (F32, F32), "plain"))
        bias = torch.randn(10)
        assert torch.equal(m.family.fresh(m.x, m.own, SCALE, bias), bias.expand(t, 10))
        dx, grads = m.family.back(m.dz, m.x, m.own, SCALE, None, True, (True, True, False, False, True))
        assert all(g.shape == s.shape and not g.any() for g, s in zip((dx, *grads[:2], grads[4]), (m.x, m.A, m.B, m.own[4]), strict=True))


def test_equal_bits_of_two_runs():
    m = make((SHAPES[1], (F16, F32), "plain"))
    runs = [[m.family.fresh(m.x, m.own, SCALE, None), m.family.back(m.dz, m.x, m.own, SCALE, None, True, (True, True, False, False, True))]
            for _ in range(2)]  # fmt: skip
    (y1, (dx1, g1)), (y2, (dx2, g2)) = runs
    assert torch.equal(y1, y2) and torch.equal(dx1, dx2)
    assert all(torch.equal(a, b) for a, b in zip(g1, g2, strict=True) if a is not None)


@pytest.mark.parametrize(("kind", "dtype"), [("alone", F16), ("gain", F32), ("beside", F16)])
def test_layers(kind, dtype, monkeypatch):
    """Through autograd with router rows: the choice is from elsewhere, so that no rounding makes another one."""
    monkeypatch.setattr(steps, "ONE_PASS", 0)
    for name in ("fresh", "add", "back"):
        monkeypatch.setattr(grouped.Family, name, lambda *a: pytest.fail("the torch family ran"))
    size, out, ranks = 40, 35, (3, 16, 2)
    start = {"x": (3, 11, size), "A": (21, size), "B": (out, 21), "rows": (3, size), "A2": (3, size), "B2": (out, 3), "g": (out,)}
    start = {n: torch.randn(s) / s[-1] ** 0.5 for n, s in start.items()}
    used = [n for n in start if (n != "g" or kind == "gain") and (n not in ("A2", "B2") or kind != "alone")]
    W, bias, d = (torch.randn(s).to(dtype) for s in ((out, size), (out,), (3, 11, out)))
    index = torch.rand(3, 11, 3).topk(2, -1)[1]
    runs = []
    for how, to in (("ours", dtype), ("exact", torch.float64), ("plain", dtype)):
        own = {n: start[n].to(dtype).to(to if n == "x" or how != "ours" else F32).requires_grad_() for n in used}
        weigh = lambda p, x: (index, torch.softmax(p.gather(-1, index).to(torch.promote_types(p.dtype, F32)), -1))  # noqa: E731
        if how == "ours":
            terms = [Grouped(own["A"], own["B"], ranks, weigh, 0.7, own["rows"])]
            terms += [LowRank(own["A2"], own["B2"], 0.5)] if kind != "alone" else []
            y = adapted_linear(own["x"], W, bias, terms + ([Gain(own["g"])] if kind == "gain" else []), impl="triton")
        else:
            _, w = weigh(own["x"] @ own["rows"].T, None)
            added = [papers.grouped(own["x"], own["A"], own["B"], ranks, index, w.to(to), 0.7)]
            added += [papers.low_rank(own["x"], own["A2"], own["B2"], 0.5)] if kind != "alone" else []
            y = papers.site(own["x"], W.to(to), bias.to(to), added, own.get("g"))
        runs.append([y.detach(), *torch.autograd.grad(y, list(own.values()), d.to(y.dtype))])
    for name, got, exact, plain in zip(("y", *used), *runs, strict=True):
        as_good(got, exact, plain, f"{name}, {kind}")


def test_phatgoose_past_the_limit(monkeypatch):
    """A module, chosen by FASTPEFT_IMPL: as good as all experts in torch."""
    results = {}
    for how, impl, dtype in (("grouped", "triton", F32), ("all", "torch", torch.float64), ("all", "torch", F32)):
        limit = (grouping.Limit(1 << 30, 1, "tests"),)
        monkeypatch.setattr(grouping, "LIMITS", {("cpu", dtype): limit} if how == "grouped" else {})
        monkeypatch.setenv("FASTPEFT_IMPL", impl)
        torch.manual_seed(0)
        layer = AdaptedLinear(48, 36, method="phatgoose", experts=Experts(tuple("abc"), (3, 5, 2), 0.7, fresh=True), k=3)
        own = layer.adapter.phatgoose
        with torch.no_grad():
            for p in own.parameters():
                p.add_(0.3 * torch.randn_like(p))
        layer = layer.to(dtype)
        x, d = torch.randn(2, 9, 48).to(dtype).requires_grad_(), torch.randn(2, 9, 36).to(dtype)
        y = layer(x)
        results[how, dtype] = [y.detach(), *torch.autograd.grad(y, [x, own.A, own.B, own.V], d)]
    for name, got, want, plain in zip(("y", "x", "A", "B", "V"), *results.values(), strict=True):
        as_good(got, want, plain, name)


# planted faults


def last_tile_dropped(m):
    real = kernel._tiles
    m.setattr(kernel, "_tiles", lambda *a: max(1, real(*a) - 5))


def ranks_shifted(m):
    real = kernel._starts
    m.setattr(kernel, "_starts", lambda ranks, device: real(ranks[::-1], device))


def only_the_first_place(m):
    real = kernel._expand

    def expand(z, u, f, order, ends, *rest):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(kernel, "range", lambda k: (0,), raising=False)
            real(z, u, f, order, ends, *rest)

    m.setattr(kernel, "_expand", expand)


def always_fresh(m):
    real = kernel._expand
    m.setattr(kernel, "_expand", lambda *a: real(*a[:-1], True))


def weights_by_slot(m):
    real = kernel._shrink
    m.setattr(kernel, "_shrink", lambda x, f, order, ends, w, *a: real(x, f, order, ends, None if w is None else w[order], *a))


def dw_of_the_first_rank_tile(m):
    real = kernel.lowrank._sum
    m.setattr(kernel.lowrank, "_sum", lambda parts, out, count: real(parts, out, count) if out is None or count < 2 else out.copy_(parts[0]))


def unsorted_pairs(m):
    real = grouped.segments
    m.setattr(grouped, "segments", lambda *a: (real(*a)[0].sort()[0], real(*a)[1]))


def scale_forgotten_in_backward(m):
    real = kernel.du
    m.setattr(kernel, "du", lambda *a: real(*a[:-1], 1.0))


def gradient_transposed(m):
    real = kernel.outer
    m.setattr(kernel, "outer", lambda x, u, like, *a: real(x, u, like, *a).flip(0 if a[-1] else 1))


FORWARD, BACKWARD = "forward", "backward"
FAULTS = {
    last_tile_dropped: FORWARD, ranks_shifted: FORWARD, only_the_first_place: FORWARD, always_fresh: FORWARD, unsorted_pairs: FORWARD,
    weights_by_slot: BACKWARD, dw_of_the_first_rank_tile: BACKWARD, scale_forgotten_in_backward: BACKWARD, gradient_transposed: BACKWARD,
}  # fmt: skip
CHECKS = {FORWARD: lambda: test_fresh_and_add(FAULTY), BACKWARD: lambda: test_back(FAULTY)}
FAULTY = ((12, 7, 9, (5, 40, 3), 2), (F32, F32), "plain")


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_planted(check):
    CHECKS[check]()


@pytest.mark.parametrize("plant", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"error|differs"):
        CHECKS[FAULTS[plant]]()


def test_bad_input():
    m = make(((6, 12, 10, (3, 4), 2), (F32, F32), "plain"))
    x, own, back = m.x, m.own, (True, True, False, False, True)
    with pytest.raises(TypeError, match=r"grouped down: A is torch.float64.*impl='torch'"):
        m.family.fresh(x, [m.A.double(), *own[1:]], SCALE, None)
    for call in (
        lambda: m.family.fresh(x[:, :11], own, SCALE, None),
        lambda: m.family.fresh(x[:5], own, SCALE, None),
        lambda: m.family.fresh(x, own, SCALE, torch.ones(9)),
        lambda: m.family.add(m.dz[:, :9], x, own, SCALE),
        lambda: m.family.back(m.dz[:, :9], x, own, SCALE, None, False, back),
        lambda: m.family.back(m.dz, x[:5], own, SCALE, None, False, back),
        lambda: m.family.fresh(x, [*own[:4], own[4][:-1]], SCALE, None),
        lambda: m.family.fresh(x, [*own[:3], own[3].long(), own[4]], SCALE, None),
        lambda: m.family.fresh(x, [*own[:3], own[3][:-1], own[4]], SCALE, None),
        lambda: ops.Family((3, 3), 2).fresh(x, own, SCALE, None),
    ):
        with pytest.raises(ValueError, match="has shape"):
            call()


def test_opcheck_of_every_operator(monkeypatch):
    m = make(((6, 12, 10, (3, 4), 2), (F32, F32), "plain"))
    A, B, order, ends, w = m.own
    u = torch.randn(12, 16)
    calls = {
        "triton_grouped_down": (m.x, A, order, ends, w, (3, 4), F32),
        "triton_grouped_du": (m.dz, B, u, order, ends, w, (3, 4), SCALE),
        "triton_grouped_up": (u, B, order, ends, (3, 4), SCALE, torch.randn(10), 6),
        "triton_grouped_up_add": (m.dz, u, B, order, ends, (3, 4), SCALE),
        "triton_grouped_outer": (m.x, u, A, order, ends, w, (3, 4), SCALE, True),
    }
    assert set(calls) == {schema.partition("(")[0] for schema, _, _ in ops._OPERATORS}
    # a slot has no number past its expert's rank
    monkeypatch.setattr(kernel.memory, "empty", kernel.memory.zeros)
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, arguments)
