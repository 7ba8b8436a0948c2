"""Kron, Sparse, Dense and Khatri-Rao terms, alone and with every other term, against the dense formula in fp64."""

from __future__ import annotations

import itertools
import math

import papers
import pytest
import torch
from checks import DT, rand
from test_memory import saved_bytes
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.ops import kron, sparse
from fastpeft.ops.workspace import release, workspace
from fastpeft.terms import (
    APPLY,
    Bias,
    Dense,
    Gain,
    KhatriRao,
    Kron,
    LowRank,
    Sparse,
    delta_weight,
    effective_weight,
)

OUT, IN = 12, 20


def support(rows, cols, count, generator=None):
    """int32 [2, count]: distinct entries in row-major order."""
    flat = torch.randperm(rows * cols, generator=generator)[:count].sort().values
    return torch.stack([flat // cols, flat % cols]).to(torch.int32)


def pieces(dtype=DT):
    """Leaves by name, and terms by name over them, for a layer of [OUT, IN]."""
    make = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    leaf = {
        "C": make(3, 4), "D": make(4, 5), "a1": make(2, IN), "a2": make(2, IN), "b1": make(OUT, 2), "b2": make(OUT, 2),
        "values": make(30), "delta": make(OUT, IN), "A": make(4, IN), "B": make(OUT, 4), "g": make(OUT), "b": make(OUT),
    }  # fmt: skip
    index = support(OUT, IN, 30)
    terms = {
        "kron": Kron(leaf["C"], leaf["D"], 1.3),
        "khatri": LowRank(KhatriRao(leaf["a1"], leaf["a2"]), KhatriRao(leaf["b1"], leaf["b2"]), 0.7),
        "copy": Sparse(leaf["values"], index),
        "window": Sparse(leaf["values"], index, "window"),
        "exact": Sparse(leaf["values"], index, "exact"),
        "dense": Dense(leaf["delta"]),
        "low": LowRank(leaf["A"], leaf["B"], 1.1),
        "mid": LowRank(leaf["A"], leaf["B"], 0.5, mid=lambda u, p, x: torch.tanh(u)),
        "dropped": LowRank(leaf["A"], leaf["B"], 0.9, dropout=0.4),
        "gain": Gain(leaf["g"]),
        "gain dropped": Gain(leaf["g"], 0.3),
        "bias": Bias(leaf["b"]),
    }
    return leaf, terms


WHOLE = ("kron", "khatri", "copy", "window", "exact", "dense")
NAMES = list(pieces()[1])
SETS = [
    names for k in (1, 2, 3) for names in itertools.combinations(NAMES, k)
    if set(names) & set(WHOLE) and not {"gain", "gain dropped"} <= set(names)
]  # fmt: skip


def want(names, terms, leaf, x, W, bias, seed):
    """The formula of fastpeft.terms, written out."""
    total, gain = 0, None
    for name in names:
        t = terms[name]
        if name in ("mid", "dropped"):
            mask = fastpeft.dropout_mask(seed, x.shape, t.dropout) if t.dropout else 1
            u = (x * mask) @ t.A.T
            total = total + t.scale * (torch.tanh(u) if t.mid else u) @ t.B.T
        elif name.startswith("gain"):
            gain = t
        elif name == "bias":
            bias = bias + t.b
        else:
            total = total + x @ delta_weight(t, DT, shape=W.shape).T
    base = x @ W.T
    if gain is None:
        return base + total + bias
    mask = fastpeft.dropout_mask(seed, x.shape, gain.dropout) if gain.dropout else 1
    return base + (gain.g - 1) * ((x * mask) @ W.T) + gain.g * total + bias


@pytest.mark.parametrize("first", range(0, len(SETS), 40))
def test_every_set_of_terms(first):
    for names in SETS[first : first + 40]:
        torch.manual_seed(len(names) + first)
        leaf, terms = pieces()
        x, W, bias, seed = rand(3, 7, IN), rand(OUT, IN, grad=False), rand(OUT), torch.tensor(77)
        before = W.clone()
        y = fastpeft.adapted_linear(x, W, bias, [terms[n] for n in names], seed=seed)
        z = want(names, terms, leaf, x, W, bias, seed)
        assert_fp64(y, z, str(names))
        inputs, d = [x, bias, *leaf.values()], torch.randn_like(z)
        got, expected = (torch.autograd.grad(t, inputs, d, allow_unused=True) for t in (y, z))
        for name, a, b in zip(("x", "bias", *leaf), got, expected, strict=True):
            assert (a is None) == (b is None), f"{names}: the gradient of {name}"
            if a is not None:
                assert_fp64(a, b, f"{name} of {names}")
        assert torch.equal(W, before)


def random_case(case):
    """(x, W, terms, leaves) of random shapes, factor shapes and density; the number is the seed."""
    g = torch.Generator().manual_seed(case)
    torch.manual_seed(case)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    a, b, c, d = (draw(1, 9) for _ in range(4))
    out, size, r = a * b, c * d, draw(1, 4)
    x = rand(*[(), (draw(1, 40),), (draw(1, 5), draw(1, 7))][draw(0, 2)], size)
    index = support(out, size, draw(0, out * size), g)
    kind = ("kron", "khatri", *APPLY)[case % 5]
    if kind == "kron":
        leaves = [rand(a, c), rand(b, d)]
        return x, rand(out, size, grad=False), [Kron(*leaves, draw(1, 30) / 10)], leaves
    if kind == "khatri":
        leaves = [rand(r, size), rand(r, size), rand(out, r), rand(out, r)]
        return x, rand(out, size, grad=False), [LowRank(KhatriRao(*leaves[:2]), KhatriRao(*leaves[2:]), 0.6)], leaves
    leaves = [rand(index.shape[1])]
    return x, rand(out, size, grad=False), [Sparse(leaves[0], index, kind)], leaves


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_random_layers(first):
    """1000 layers, 200 of each kind of term."""
    for case in range(first, first + 100):
        x, W, terms, leaves = random_case(case)
        y = fastpeft.adapted_linear(x, W, None, terms)
        z = x @ effective_weight(W, terms, DT).T
        assert_fp64(y, z, f"y of case {case}")
        d = torch.randn_like(z)
        pairs = zip(*(torch.autograd.grad(t, [x, *leaves], d) for t in (y, z)), strict=True)
        for k, (got, expected) in enumerate(pairs):
            assert_fp64(got, expected, f"gradient {k} of case {case}")


@pytest.mark.parametrize("name", WHOLE)
def test_gradcheck(name):
    torch.manual_seed(1)
    leaf, terms = pieces()
    used = {"kron": "CD", "dense": ["delta"], "khatri": ["a1", "a2", "b1", "b2"]}.get(name, ["values"])
    x, W = rand(2, IN), rand(OUT, IN, grad=False)
    f = lambda x, *_: fastpeft.adapted_linear(x, W, None, [terms[name], terms["gain"]])  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, *(leaf[n] for n in used), leaf["g"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WHOLE)
def test_as_good_as_plain_pytorch(name, dtype):
    """A term over fp32 tensors on a layer of `dtype`, beside the dense formula in that dtype, both against fp64.

    A copy and a window round W + value to W's dtype; so does what they are compared with.
    """
    torch.manual_seed(5)
    out, size, tokens = 120, 160, 200
    make = lambda *shape: (torch.randn(*shape) / math.sqrt(shape[-1])).requires_grad_()  # noqa: E731
    leaves = {
        "kron": [make(10, 16), make(12, 10)],
        "khatri": [make(3, size), make(3, size), make(out, 3), make(out, 3)],
        "dense": [make(out, size)],
    }.get(name, [make(400)])
    index = support(out, size, 400)

    def term(own):
        if name == "kron":
            return Kron(*own, 1.5)
        if name == "khatri":
            return LowRank(KhatriRao(*own[:2]), KhatriRao(*own[2:]), 1.5)
        return Dense(*own) if name == "dense" else Sparse(own[0], index, name)

    W = (torch.randn(out, size) / math.sqrt(size)).to(dtype)
    x, d = torch.randn(tokens, size, dtype=dtype), torch.randn(tokens, out, dtype=dtype)
    seen = []
    for kind in ("ours", "exact", "plain"):
        to = torch.float64 if kind == "exact" else dtype
        leaf = x.to(to).requires_grad_()
        own = [t.to(torch.float64) if kind == "exact" else t for t in leaves]
        if kind == "ours":
            y = fastpeft.adapted_linear(leaf, W, None, [term(own)])
        elif kind == "plain" and name in ("copy", "window"):
            y = leaf @ (W.float() + delta_weight(term(own), shape=W.shape)).to(dtype).T
        else:
            y = leaf @ W.to(to).T + leaf @ delta_weight(term(own), torch.float64 if kind == "exact" else torch.float32,
                                                        shape=W.shape).to(to).T  # fmt: skip
        grads = torch.autograd.grad(y, [leaf, *(own if kind == "exact" else leaves)], d.to(to), retain_graph=True)
        seen.append([y, *grads])
    for k, (got, exact, plain) in enumerate(zip(*seen, strict=True)):
        assert_as_good(got, exact, plain, f"{name} {k}")


def test_autocast_casts_x_and_leaves_gradients_wide():
    torch.manual_seed(2)
    leaf, terms = pieces(torch.float32)
    x, W = torch.randn(6, IN, requires_grad=True), torch.randn(OUT, IN)
    for name in WHOLE:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = fastpeft.adapted_linear(x, W, None, [terms[name]])
        assert y.dtype is torch.bfloat16
        exact = x.double() @ effective_weight(W, [terms[name]], DT).T
        plain = x.bfloat16() @ effective_weight(W, [terms[name]]).bfloat16().T
        assert_as_good(y, exact, plain, name)
        own = [t for t in leaf.values() if t.requires_grad]
        grads = torch.autograd.grad(y.float().sum(), [x, *own], allow_unused=True)
        assert grads[0].dtype is torch.float32
        assert {g.dtype for g in grads[1:] if g is not None} == {torch.float32}


@pytest.mark.parametrize("name", WHOLE)
def test_a_base_that_trains_gets_its_gradient(name):
    _, terms = pieces()
    x, W = rand(5, IN), rand(OUT, IN)
    y = fastpeft.adapted_linear(x, W, None, [terms[name]])
    z = x @ (W + delta_weight(terms[name], DT, shape=W.shape)).T
    d = torch.randn_like(z)
    for got, expected in zip(*(torch.autograd.grad(t, (x, W), d) for t in (y, z)), strict=True):
        assert_fp64(got, expected, name)


@pytest.mark.parametrize("name", WHOLE)
def test_a_transposed_weight_and_a_transposed_x(name):
    _, terms = pieces()
    x, W = rand(IN, 5, 3).permute(2, 1, 0), rand(IN, OUT, grad=False).T
    before = W.clone()
    y = fastpeft.adapted_linear(x, W, None, [terms[name]])
    assert_fp64(y, x @ effective_weight(W, [terms[name]], DT).T, name)
    assert torch.equal(W, before)


# ---- memory, and W itself


@pytest.mark.parametrize("name", WHOLE)
def test_x_alone_is_kept_and_only_if_the_term_trains(name):
    _, terms = pieces(torch.float32)

    class Layer(nn.Module):
        def __init__(self, trains):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(OUT, IN), requires_grad=False)
            t = terms[name]
            parts = {"kron": ("C", "D"), "dense": ("delta",), "khatri": ("A", "B")}.get(name, ("values",))
            held = [getattr(t, p) for p in parts]
            flat = [q for h in held for q in (h if isinstance(h, KhatriRao) else (h,))]
            self.own = nn.ParameterList([nn.Parameter(f.detach(), requires_grad=trains) for f in flat])

        def forward(self, x):
            o = list(self.own)
            if name == "khatri":
                term = LowRank(KhatriRao(*o[:2]), KhatriRao(*o[2:]))
            elif name in APPLY:
                term = Sparse(o[0], terms[name].index, name)
            else:
                term = {"kron": Kron, "dense": Dense}[name](*o)
            return fastpeft.adapted_linear(x, self.weight, None, [term])

    x = torch.randn(64, IN, requires_grad=True)
    index = 4 * 2 * 30 if name in APPLY else 0  # the index is no parameter
    for trains in (True, False):
        layer = Layer(trains)
        assert saved_bytes(lambda: layer(x), layer) == index + (4 * 64 * IN if trains else 0)  # noqa: B023


def test_window_leaves_bits_and_version_of_the_weight():
    _, terms = pieces(torch.float32)
    W = torch.randn(OUT, IN)
    rows, cols = terms["window"].index.long()
    W[rows[0], cols[0]], W[rows[1], cols[1]] = float("nan"), -0.0
    bits, version, x = W.view(torch.int32).clone(), W._version, torch.randn(5, IN, requires_grad=True)
    y = fastpeft.adapted_linear(x, W, None, [terms["window"]])
    assert torch.equal(W.view(torch.int32), bits) and W._version == version
    y.sum().backward()
    assert torch.equal(W.view(torch.int32), bits) and W._version == version


def test_window_restores_after_an_error(monkeypatch):
    _, terms = pieces(torch.float32)
    W, x = torch.randn(OUT, IN), torch.randn(5, IN)
    before = W.clone()
    monkeypatch.setattr(Plain, "forward", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastpeft.adapted_linear(x, W, None, [terms["window"]])
    assert torch.equal(W, before)


def test_copy_and_window_have_equal_bits():
    for dtype in (torch.float32, torch.bfloat16):
        _, terms = pieces(torch.float32)
        W, x = torch.randn(OUT, IN, dtype=dtype), torch.randn(9, IN, dtype=dtype).requires_grad_()
        seen = []
        for name in ("copy", "window"):
            y = fastpeft.adapted_linear(x, W, None, [terms[name]])
            seen.append((y, *torch.autograd.grad(y.float().square().sum(), (x, terms[name].values))))
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_exact_keeps_what_a_copy_rounds_away():
    """A value of a thousandth beside a bf16 weight of one is nothing to the copy."""
    W, x = torch.ones(2, 2, dtype=torch.bfloat16), torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)
    index, values = torch.tensor([[0], [0]], dtype=torch.int32), torch.tensor([1e-3])
    lost, kept = (fastpeft.adapted_linear(x, W, None, [Sparse(values, index, how)]) for how in ("copy", "exact"))
    assert lost[0, 0] == 0 and abs(kept[0, 0].item() - 1e-3) < 1e-5


def test_a_reference_forward_between_forward_and_backward_changes_nothing():
    """Two layers share the workspace; the second one's weight is in it when the first one's backward starts."""
    _, terms = pieces()
    x, W, V = rand(5, IN), rand(OUT, IN, grad=False), rand(OUT, IN, grad=False)
    y = fastpeft.adapted_linear(x, W, None, [terms["copy"]])
    fastpeft.adapted_linear(x, V, None, [terms["dense"]])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_fp64(dx, (torch.ones_like(y) @ effective_weight(W, [terms["copy"]], DT)).detach())


def test_the_workspace_is_reused_and_released():
    release()
    first = workspace(8, 4, torch.float32, torch.device("cpu"))
    assert workspace(2, 3, torch.float32, torch.device("cpu")).data_ptr() == first.data_ptr()
    assert workspace(2, 3, torch.bfloat16, torch.device("cpu")).data_ptr() != first.data_ptr()
    assert workspace(9, 9, torch.float32, torch.device("cpu")).numel() == 81
    release()


def test_a_delta_without_storage_collects_the_weight_gradient():
    leaf = torch.zeros((), dtype=DT).expand(OUT, IN).requires_grad_()
    x, W = rand(3, 5, IN), rand(OUT, IN)
    y = fastpeft.adapted_linear(x, W.detach(), None, [Dense(leaf)])
    assert_fp64(y, x @ W.T)
    d = torch.randn_like(y)
    (got,), (expected,) = torch.autograd.grad(y, leaf, d), torch.autograd.grad(x @ W.T, W, d)
    assert_fp64(got, expected)
    x0 = x.detach()  # and where nothing else needs a gradient
    (again,) = torch.autograd.grad(fastpeft.adapted_linear(x0, W.detach(), None, [Dense(leaf)]), leaf, d)
    assert_fp64(again, expected)


# ---- routes of the values' gradient


@pytest.mark.parametrize("count", [0, 1, 3, 400, 35 * 40])
@pytest.mark.parametrize("route", ["grad", "grad_by_entry", "grad_by_chunk"])
def test_every_route_of_the_gradient(route, count, monkeypatch):
    monkeypatch.setattr(sparse, "CHUNK", 500)  # several chunks
    index = support(35, 40, count)
    dz, x = rand(33, 35, grad=False), rand(33, 40, grad=False)
    got = getattr(sparse, route)(dz, x, index, DT)
    rows, cols = index.long()
    assert_fp64(got, (dz.T @ x)[rows, cols], route)


def test_the_gradient_in_a_wider_dtype_is_not_rounded_in_between():
    index = support(35, 40, 300)
    dz, x = torch.randn(333, 35).bfloat16(), torch.randn(333, 40).bfloat16()
    rows, cols = index.long()
    exact = (dz.double().T @ x.double())[rows, cols]
    plain = (dz.float().T @ x.float())[rows, cols]
    for route in (sparse.grad, sparse.grad_by_entry, sparse.grad_by_chunk):
        assert_as_good(route(dz, x, index, torch.float32), exact, plain, route.__name__)


# ---- kron.product


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 6, 5, 1), (7, 3, 2, 5), (4, 1, 1, 9)], ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (3, 50)], ids=str)
def test_kron_product(shape, lead):
    a, b, c, d = shape
    x, C, D = rand(*lead, c * d), rand(a, c), rand(b, d)
    y, z = kron.product(x, C, D, 1.7), 1.7 * x @ papers.kron(C, D).T
    assert_fp64(y, z)
    g = torch.randn_like(z)
    for got, expected in zip(*(torch.autograd.grad(t, (x, C, D), g) for t in (y, z)), strict=True):
        assert_fp64(got, expected)
    with pytest.raises(ValueError, match=r"kron\.product"):
        kron.product(rand(*lead, c * d + 1), C, D)


def test_kron_in_slabs(monkeypatch):
    """More tokens than one slab holds."""
    from fastpeft.ops import slabs

    monkeypatch.setattr(slabs, "SLAB_BYTES", 8 * 20 * 3)
    x, C, D = rand(50, 20), rand(3, 4), rand(4, 5)
    y, z = kron.product(x, C, D, 1.7), 1.7 * x @ papers.kron(C, D).T
    g = torch.randn_like(z)
    assert_fp64(y, z)
    for got, expected in zip(*(torch.autograd.grad(t, (x, C, D), g) for t in (y, z)), strict=True):
        assert_fp64(got, expected)


# ---- bad terms


def bad_terms():
    v, i = torch.zeros(2), torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    a, b = torch.zeros(2, IN), torch.zeros(OUT, 2)
    return {
        "Kron of another size": (Kron(torch.zeros(3, 4), torch.zeros(4, 4)), "a \\* b = out = 12"),
        "Kron of three dimensions": (Kron(torch.zeros(3, 4, 1), torch.zeros(4, 5)), "C \\[a, c\\]"),
        "Dense of another size": (Dense(torch.zeros(IN, OUT)), "Dense.delta"),
        "int64 index": (Sparse(v, i.long()), "int32 \\[2, nnz\\]"),
        "index of another length": (Sparse(torch.zeros(3), i), "int32 \\[2, nnz\\]"),
        "values of two dimensions": (Sparse(torch.zeros(2, 1), i), "\\[nnz\\]"),
        "index outside": (Sparse(v, torch.tensor([[0, 12], [0, 1]], dtype=torch.int32)), "inside \\[12, 20\\]"),
        "negative index": (Sparse(v, torch.tensor([[-1, 1], [0, 1]], dtype=torch.int32)), "inside \\[12, 20\\]"),
        "unsorted index": (Sparse(v, i.flip(1)), "row-major order"),
        "repeated entry": (Sparse(v, torch.zeros_like(i)), "repetition"),
        "unknown apply": (Sparse(v, i, "overlay"), "copy, window, exact"),
        "one KhatriRao": (LowRank(KhatriRao(a, a), torch.zeros(OUT, 4)), "give both alike"),
        "KhatriRao with dropout": (LowRank(KhatriRao(a, a), KhatriRao(b, b), dropout=0.1), "no mid"),
        "KhatriRao of two ranks": (LowRank(KhatriRao(a, a), KhatriRao(b, b[:, :1])), "\\[out, r\\]"),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_terms())
def test_bad_terms_are_named(name):
    term, message = bad_terms()[name]
    with pytest.raises(ValueError, match=message):
        fastpeft.adapted_linear(torch.zeros(2, IN), torch.zeros(OUT, IN), None, [term])


# ---- planted faults


def entry_of_the_transposed(monkeypatch):
    real = sparse.grad
    monkeypatch.setattr(sparse, "grad", lambda dz, x, index, dtype: real(dz, x, index, dtype).roll(1))


def value_not_added(monkeypatch):
    monkeypatch.setattr(sparse, "_scaled", lambda values, scale: torch.zeros_like(values))


def share_of_dx_lost(monkeypatch):
    real = kron.back
    monkeypatch.setattr(kron, "back", lambda dz, x, t, s, dx, need, needs: (torch.zeros_like(x), real(dz, x, t, s, dx, need, needs)[1]))


@pytest.mark.parametrize(
    ("plant", "case"), [(entry_of_the_transposed, 2), (value_not_added, 3), (share_of_dx_lost, 0), (entry_of_the_transposed, 4)]
)
def test_planted_fault_is_found(plant, case, monkeypatch):
    def run():
        x, W, terms, leaves = random_case(case + 100)
        y = fastpeft.adapted_linear(x, W, None, terms)
        z = x @ effective_weight(W, terms, DT).T
        assert_fp64(y, z)
        d = torch.randn_like(z)
        for got, expected in zip(*(torch.autograd.grad(t, [x, *leaves], d) for t in (y, z)), strict=True):
            assert_fp64(got, expected)

    with monkeypatch.context() as planted:
        plant(planted)
        with pytest.raises(AssertionError):
            run()
    run()
