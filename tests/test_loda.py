"""LoDA and LoDA+ against their formulas and, without the map, stock PEFT; R- and S- bases, and the factored base on its own."""

from __future__ import annotations

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand, seed_after
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft.adapter import base_of
from fastpeft.base import Plain
from fastpeft.factored import Factored
from fastpeft.terms import Bias, Dense, Gain, KhatriRao, Kron, LowRank, Sparse

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, moved

IN, OUT, RANK, ALPHA = 12, 10, 3, 5.0
both = pytest.mark.parametrize("name", ["loda", "loda_plus"])
BASES = [dict(), dict(base="r", base_rank=4), dict(base="s", base_density=0.4), dict(base="s", base_density="2:4")]


def built(name, **options):
    layer = fastpeft.AdaptedLinear(IN, OUT, method=name, rank=RANK, alpha=ALPHA, **({"dtype": DT} | options))
    return moved(layer), layer.adapter.get_submodule(name)


def formula(layer, m, x, mask=None, slope=0.8):
    dt = x.dtype
    W, own = base_of(layer).dense(dt), [p.to(dt) for p in (m.A, m.B, m.M1, m.M2)]
    bias = None if layer.bias is None else layer.bias.to(dt)
    return papers.loda(x, W, bias, *own, m.scale, slope, mask, plus=m.WHO == "loda_plus")


@both
@pytest.mark.parametrize("options", [*BASES, dict(slope=0.1), dict(slope=0.0), dict(bias=False), dict(scaling="inv_sqrt_out")], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_output_and_gradients(name, options, dropout, lead):
    layer, m = built(name, dropout=dropout, **options)
    x = rand(*lead, IN)
    mask = fastpeft.dropout_mask(seed_after(5), x.shape, dropout) if dropout else None
    got, want = layer(x), formula(layer, m, x, mask, options.get("slope", 0.8))
    assert_fp64(got, want, "y")
    leaves, d = (x, m.A, m.B, m.M1, m.M2), torch.randn_like(got)
    for n, g, w in zip(("x", *"AB", "M1", "M2"), *(torch.autograd.grad(y, leaves, d) for y in (got, want)), strict=True):
        assert w.abs().max() > 1e-6 or options.get("slope") == 0.0, n
        assert_fp64(g, w, n)


@both
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_without_the_map_it_is_lora(name, lead, dropout):
    layer, m = built(name, dropout=dropout)
    with torch.no_grad():
        m.M2.zero_()
    layer.requires_grad_(False)
    m.A.requires_grad_(), m.B.requires_grad_()
    assert_equals_peft(layer, lambda: (m.A * 1, m.B * 1), ALPHA, lead, dropout)


def test_slope_one_is_linear():
    """LoDA is then LoRA of A + M2 M1 A, LoDA+ of A + M2 M1 A too."""
    for name in ("loda", "loda_plus"):
        layer, m = built(name, slope=1.0)
        x = rand(5, IN)
        A = m.A + m.M2 @ m.M1 @ m.A
        assert_fp64(layer(x), papers.lora(x, layer.weight, layer.bias, A, m.B, ALPHA / RANK), name)


@both
def test_start(name):
    """The base's output; Kaiming bounds; only B has a gradient yet."""
    layer = fastpeft.AdaptedLinear(256, 64, method=name, rank=16)
    m = layer.adapter.get_submodule(name)
    x = torch.randn(40, 256)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert 0.95 / 16 < m.A.abs().max() <= 1 / 16
    for M in (m.M1, m.M2):
        assert M.shape == (16, 16) and 0.9 / 4 < M.abs().max() <= 1 / 4
    layer(x).square().sum().backward()
    assert m.B.grad.abs().max() > 0 and not any(p.grad.any() for p in (m.A, m.M1, m.M2))
    assert sum(p.numel() for p in m.parameters()) == 16 * (256 + 64) + 2 * 16**2


@both
def test_scaling(name):
    assert built(name)[1].scale == ALPHA / RANK
    assert built(name, scaling="inv_sqrt_out")[1].scale == OUT**-0.5


@pytest.mark.parametrize(("name", "numbers"), [("loda", 5 * RANK), ("loda_plus", 6 * RANK)])
def test_what_is_kept(name, numbers):
    """Per token beside x; nothing of y's width."""
    layer, _ = built(name)
    kept = {}
    x = rand(40, IN)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in (x, *layer.parameters())}
    sizes = [t.numel() // 40 for p, t in kept.items() if p not in own and t.dim() == 2 and t.shape[0] == 40]
    assert 0 < sum(sizes) <= numbers, sizes
    assert all(s < OUT for s in sizes)


@both
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_as_good_as_plain_pytorch_on_a_bf16_base(name, dropout):
    layer, m = built(name, dtype=torch.bfloat16, dropout=dropout)
    own = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert {p.dtype for p in own.values()} == {torch.float32}
    x, d = torch.randn(64, IN, dtype=torch.bfloat16), torch.randn(64, OUT, dtype=torch.bfloat16)
    mask = fastpeft.dropout_mask(seed_after(5), x.shape, dropout) if dropout else None
    seen = []
    for kind in ("ours", "exact", "plain"):
        leaf = (x.double() if kind == "exact" else x).requires_grad_()
        at = None if mask is None else mask.to(leaf.dtype)
        seed_after(5)
        y = layer(leaf) if kind == "ours" else formula(layer, m, leaf, at)
        seen.append({"y": y} | dict(zip(("x", *own), torch.autograd.grad(y, (leaf, *own.values()), d.to(y.dtype)), strict=True)))
    for n, got in seen[0].items():
        assert_as_good(got, seen[1][n].double(), seen[2][n], n)


@both
def test_merge_and_export_refuse(name, tmp_path):
    model = MLP()
    fastpeft.adapt(model, name, rank=RANK)
    for refuse in (fastpeft.merge, lambda m: fastpeft.export_lora(m, tmp_path / "out")):
        with pytest.raises(ValueError, match="token-dependent"):
            refuse(perturb(model))


@both
@pytest.mark.parametrize("R", [1, 4, OUT])
def test_low_rank_base(name, R):
    """U V is the best approximation: what is missing are the singular values after the first R."""
    layer, _ = built(name, base="r", base_rank=R)
    stored = layer.adapter.base
    assert stored.U.shape == (OUT, R) and stored.V.shape == (R, IN)
    S = torch.linalg.svdvals(layer.weight)
    gone = torch.linalg.svdvals(layer.weight - base_of(layer).dense(DT))
    assert_fp64(gone, torch.cat([S[R:], S.new_zeros(R)]))
    assert_fp64(stored.U.norm(dim=0), S[:R].sqrt())


@both
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_sparse_base(name, density):
    """The largest entries, as they were; as many as the density says."""
    layer, _ = built(name, base="s", base_density=density)
    W, P = layer.weight, layer.adapter.base.weight
    kept = P != 0
    assert int(kept.sum()) == round(density * W.numel()) and torch.equal(P[kept], W[kept])
    assert density == 1.0 or W[kept].abs().min() > W[~kept].abs().max()


def test_two_of_four():
    layer, _ = built("loda", base="s", base_density="2:4")
    for row, pruned in zip(layer.weight, layer.adapter.base.weight, strict=True):
        for four, left in zip(row.split(4), pruned.split(4), strict=True):
            assert {float(v) for v in left if v} == {float(v) for v in sorted(four, key=abs)[2:]}


FACTORED_TERMS = {
    "none": lambda o, i: [],
    "low rank": lambda o, i: [LowRank(rand(3, i), rand(o, 3), 0.7)],
    "dropout": lambda o, i: [LowRank(rand(3, i), rand(o, 3), 0.7, dropout=0.4)],
    "two": lambda o, i: [LowRank(rand(3, i), rand(o, 3), 0.7), LowRank(rand(2, i), rand(o, 2), dropout=0.2)],
    "middle": lambda o, i: [LowRank(rand(3, i), rand(o, 3), mid=lambda u, p, x: torch.tanh(u))],
    "gain": lambda o, i: [LowRank(rand(3, i), rand(o, 3)), Gain(rand(o))],
    "gain with dropout": lambda o, i: [LowRank(rand(3, i), rand(o, 3), dropout=0.3), Gain(rand(o), dropout=0.3)],
    "dora": lambda o, i: [low := LowRank(rand(3, i), rand(o, 3), 0.5), Gain(rand(o), over=low)],
    "kron": lambda o, i: [Kron(rand(2, 3), rand(o // 2, i // 3))],
    "khatri-rao": lambda o, i: [LowRank(KhatriRao(rand(2, i), rand(2, i)), KhatriRao(rand(o, 2), rand(o, 2)))],
    "dense": lambda o, i: [Dense(rand(o, i)), Bias(rand(o))],
    "sparse": lambda o, i: [Sparse(rand(3), torch.tensor([[0, 0, 2], [1, 3, 0]], dtype=torch.int32))],
    "sparse and more": lambda o, i: [
        Sparse(rand(2), torch.tensor([[0, 4], [1, 3]], dtype=torch.int32), apply="exact"), Dense(rand(o, i)), Gain(rand(o)),
    ],
}  # fmt: skip
# the terms that change the base weight for one product, for which it is formed
ON_BASE = ("dense", "sparse", "sparse and more", "khatri-rao")


def leaves(terms):
    found = [v for t in terms for v in (getattr(t, s) for s in t.__slots__)]
    found = [w for v in found for w in (v if isinstance(v, KhatriRao) else [v])]
    return [v for v in found if isinstance(v, torch.Tensor) and v.requires_grad]


@pytest.mark.parametrize("tokens", [5, 400])
@pytest.mark.parametrize("kind", FACTORED_TERMS)
def test_a_factored_base_is_the_dense_one(kind, tokens, monkeypatch):
    """Output and every gradient with each term, few tokens and many; W is formed only where a term changes it."""
    out, width = 100, 12
    U, V, bias = rand(out, 4, grad=False), rand(4, width, grad=False), rand(out)
    terms, x = FACTORED_TERMS[kind](out, width), rand(tokens, width)
    want = fastpeft.adapted_linear(x, Plain(U @ V), bias, terms, seed=torch.tensor(7))
    if kind not in ON_BASE:
        monkeypatch.setattr(Factored, "weight", None)
        monkeypatch.setattr(Factored, "dense", None)
    got = fastpeft.adapted_linear(x, Factored(U, V), bias, terms, seed=torch.tensor(7))
    assert_fp64(got, want, "y")
    own, d = [x, bias, *leaves(terms)], torch.randn_like(want)
    for n, (g, w) in enumerate(zip(*(torch.autograd.grad(y, own, d) for y in (got, want)), strict=True)):
        assert_fp64(g, w, f"gradient {n}")


@pytest.mark.parametrize("through", [False, True])
def test_norms_over_a_factored_base(through):
    """Also where a row nearly cancels, which an expansion into products would lose."""
    U, V, A, B, m = rand(9, 4, grad=False), rand(4, 12, grad=False), rand(3, 12), rand(9, 3), rand(9)
    with torch.no_grad():
        A.copy_(V[:3] + 1e-9 * A)
        B[2].copy_(-U[2, :3])
        U[2, 3] = 0
    pairs = []
    for base in (Factored(U, V), Plain(U @ V)):
        gain = base.row_gain(m, A, B, 1.0, constant=not through)
        pairs.append([base.row_sq_norm(), base.row_sq_norm(A, B), gain * 1e-9])
    for got, want in zip(*pairs, strict=True):
        keep = torch.arange(9) != 2
        assert_fp64(got[keep], want[keep])
    # of row 2 only 1e-9 is left: 18 digits are squared, of which fp64 has 16, so both are good to 1e-7
    assert abs(pairs[0][1][2] / pairs[1][1][2] - 1) < 1e-5
    dense, factored = (torch.autograd.grad(p[1][:2].sum() + p[2][:2].sum(), (A, B)) for p in reversed(pairs))
    for g, w in zip(factored, dense, strict=True):
        assert_fp64(g, w)


def test_rows_through_a_factored_base_are_differentiable():
    base = Factored(rand(9, 4, grad=False), rand(4, 12, grad=False))
    rows = rand(3, 12)
    assert torch.autograd.gradcheck(base.linear, rows)
    assert_fp64(base.linear(rows), rows @ base.dense(DT).T)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(scaling="rs"), ValueError, r"loda: scaling='rs'"),
        (dict(base="x"), ValueError, r"loda: base='x'"),
        (dict(base="r"), ValueError, r"base_rank=None; base='r' takes base_rank"),
        (dict(base_rank=3), ValueError, r"base=None with base_rank=3"),
        (dict(base="s", base_density=0.5, base_rank=3), ValueError, r"base='s' with base_rank=3"),
        (dict(base="r", base_rank=11), ValueError, r"loda: base_rank=11 at 'linear'.*1 to 10"),
        (dict(base="s", base_density=0.0), ValueError, r"base_density=0.0.*above 0"),
        (dict(base="s", base_density=1.5), ValueError, r"base_density=1.5"),
        (dict(base="s", base_density="1:4"), ValueError, r"base_density='1:4'"),
        (dict(rank=11), ValueError, r"loda: rank=11"),
        (dict(slope=float("nan")), ValueError, r"slope=nan"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "loda", **({"rank": RANK} | options))
    if "base_density" not in options:
        return
    with pytest.raises(ValueError, match=r"loda_plus: base_density='2:4' at 'linear' with in=10"):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(10, 12), "loda_plus", rank=2, base="s", base_density="2:4")
