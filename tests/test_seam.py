"""adapted_linear against fp64 autograd of the dense formula, and what it keeps for backward."""

from __future__ import annotations

import checks
import papers
import pytest
import torch
from checks import rand
from tolerance import assert_as_good, assert_fp64

import fastpeft
from fastpeft import adapted_linear
from fastpeft.ops import steps
from fastpeft.terms import Bias, Gain, LowRank

IN, OUT, R = 8, 6, 3
SEED = torch.tensor(987654321)


def soft(u, p, x):
    return torch.tanh(u) * u


def gated(u, p, x):
    return u * torch.softmax(p, -1).sum(-1, keepdim=True) + torch.sin(p)


def cubic(z):
    return z + z**3


def factors(**options):
    n = options.get("blocks", 1)
    A, B = (rand(R, IN), rand(OUT, R)) if n == 1 else (rand(n, R, IN // n), rand(n, OUT // n, R))
    if options.get("mid") is gated:
        options["rows"] = rand(R, IN)
    return A, B, options


LOW_RANK = {
    "plain": [{}],
    "scale": [{"scale": -1.7}],
    "dropout": [{"scale": 2.0, "dropout": 0.4}],
    "mid": [{"mid": soft, "scale": 0.5}],
    "mid dropout": [{"mid": soft, "dropout": 0.3}],
    "mid rows": [{"mid": gated, "dropout": 0.3}],
    "post": [{"post": cubic, "scale": 0.5}],
    "post dropout": [{"post": torch.tanh, "mid": soft, "dropout": 0.25}],
    "blocks": [{"blocks": 2, "scale": 1.5}],
    "blocks dropout": [{"blocks": 2, "dropout": 0.4}],
    "several": [{"scale": 0.5}, {"scale": 2.0}, {"blocks": 2}, {"mid": soft}],
    "several dropouts": [{"dropout": 0.2}, {"dropout": 0.5}, {}],
    "two on one A": [{"scale": 0.5}, "shared"],
}
GAIN = {"none": None, "gain": 0.0, "gain dropout": 0.3}


def problem(lows, gain_p=None, lead=(5,), bias=True):
    """(inputs by name, terms, dense) where dense() is the oracle's y, all on the same leaves."""
    x, W, b = rand(*lead, IN), rand(OUT, IN, grad=False), rand(OUT, grad=False) if bias else None
    leaves, terms, made = {"x": x}, [], []
    for k, options in enumerate(lows):
        if options == "shared":
            A, B, options = terms[0].A, rand(OUT, R), {"scale": -0.3}
        else:
            A, B, options = factors(**options)
        terms.append(LowRank(A, B, **options))
        leaves |= {f"A{k}": A, f"B{k}": B} | ({"rows": options["rows"]} if "rows" in options else {})
    for t in terms:
        mask = fastpeft.dropout_mask(SEED, x.shape, t.dropout) if t.dropout else None
        made.append((t, mask))
    gain_mask = fastpeft.dropout_mask(SEED, x.shape, gain_p) if gain_p else None
    g = None
    if gain_p is not None:
        g = leaves["g"] = rand(OUT)
        terms.append(Gain(g, dropout=gain_p))
    extra = leaves["bias term"] = rand(OUT)
    terms.append(Bias(extra))

    def dense(x=x):
        added = [papers.low_rank(x, t.A, t.B, t.scale, m, t.mid, t.rows, t.post, t.blocks) for t, m in made]
        return papers.site(x, W, b, added, g, gain_mask, [extra])

    return leaves, W, b, terms, dense


def assert_same(leaves, got, want):
    assert_fp64(got, want, "y")
    d = torch.randn_like(want)
    names, inputs = zip(*leaves.items(), strict=True)
    for name, a, b in zip(names, torch.autograd.grad(got, inputs, d), torch.autograd.grad(want, inputs, d), strict=True):
        assert_fp64(a, b, name)


CASES = [(n, g) for n in LOW_RANK for g in GAIN if not (n.startswith("post") and g != "none")]


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(("name", "gain"), CASES)
def test_equals_dense_formula(name, gain, one_pass, monkeypatch):
    """Where the adapter is added to the base product, as for few numbers, and where it comes first."""
    monkeypatch.setattr(steps, "ONE_PASS", 0 if one_pass else 1 << 60)
    leaves, W, b, terms, dense = problem(LOW_RANK[name], GAIN[gain])
    assert_same(leaves, adapted_linear(leaves["x"], W, b, terms, seed=SEED), dense())


@pytest.mark.parametrize(("name", "gain"), CASES)
def test_gradcheck(name, gain):
    leaves, W, b, terms, _ = problem(LOW_RANK[name], GAIN[gain], lead=(3,))
    assert torch.autograd.gradcheck(lambda *_: adapted_linear(leaves["x"], W, b, terms, seed=SEED), tuple(leaves.values()))


@pytest.mark.parametrize("name", ["forward", "dx", "dA", "dB", "dropout", "blocks", "gain", "dylora_ranks", "dora_after_fused_step"])
def test_small_checks(name):
    getattr(checks, f"check_{name}")()


@pytest.mark.parametrize("gain_p", [None, 0.0, 0.3])
def test_base_that_trains(gain_p):
    """dW and the base bias's gradient; also with x that needs none."""
    leaves, W, b, terms, dense = problem([{"dropout": 0.4}], gain_p)
    leaves |= {"W": W.requires_grad_(), "b": b.requires_grad_()}
    assert_same(leaves, adapted_linear(leaves["x"], W, b, terms, seed=SEED), dense())
    x = leaves.pop("x").detach()
    got, want = adapted_linear(x, W, b, terms, seed=SEED), dense(x)
    assert_same(leaves, got, want)


LEADS = [(), (1,), (5,), (2, 3), (2, 1, 3), (2, 1, 2, 2)]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("gain_p", [None, 0.3])
def test_leading_dimensions(lead, gain_p):
    leaves, W, b, terms, dense = problem([{"dropout": 0.4}, {"mid": gated}], gain_p, lead)
    assert_same(leaves, adapted_linear(leaves["x"], W, b, terms, seed=SEED), dense())


@pytest.mark.parametrize("gain_p", [None, 0.0, 0.3])
def test_strided_x(gain_p):
    leaves, W, b, terms, dense = problem([{"dropout": 0.4}], gain_p, (2, 3))
    x = leaves.pop("x").detach()
    for view in (x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, -1)[..., ::2],
                 x.permute(2, 0, 1).contiguous().permute(1, 2, 0)):  # fmt: skip
        assert not view.is_contiguous() and torch.equal(view, x)
        view = view.requires_grad_()
        assert_same(leaves | {"x": view}, adapted_linear(view, W, b, terms, seed=SEED), dense(view))


@pytest.mark.parametrize("gain_p", [None, 0.0, 0.3])
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_empty_batch(gain_p, lead):
    leaves, W, b, terms, _ = problem([{"dropout": 0.4}], gain_p, lead)
    y = adapted_linear(leaves["x"], W, b, terms, seed=SEED)
    assert y.shape == (*lead, OUT)
    y.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and not leaf.grad.any(), name


@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("gain", [False, True])
def test_dtypes_as_good_as_plain_pytorch(kind, gain):
    """fp32; bf16 base with fp32 factors; fp32 base under bf16 autocast: no worse than the composition users would write."""
    low = torch.float32 if kind == "fp32" else torch.bfloat16
    base = torch.bfloat16 if kind == "bf16" else torch.float32
    x, W, A, B = torch.randn(64, 48), torch.randn(40, 48) / 7, torch.randn(4, 48) / 7, torch.randn(40, 4) / 2
    g, d = torch.rand(40) + 0.5, torch.randn(64, 40)
    x, W, d = x.to(base), W.to(base), d.to(low)

    def leaves(dtype=None):
        return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in (x, A, B, g)]

    def run(y, ins):
        used = ins if gain else ins[:3]
        return [y, *torch.autograd.grad(y, used, d.to(y.dtype))]

    def formula(x, A, B, g, W):
        if kind == "bf16":
            A, B, g = A.to(low), B.to(low), g.to(low)
        z = x @ W.T + 2.0 * ((x @ A.T) @ B.T)
        return z * g.to(z.dtype) if gain else z

    ours, plain, true = leaves(), leaves(), leaves(torch.float64)
    terms = [LowRank(ours[1], ours[2], 2.0)] + ([Gain(ours[3])] if gain else [])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        y, y_plain = adapted_linear(ours[0], W, None, terms), formula(*plain, W)
    assert y.dtype == low
    want = true[0] @ W.double().T + 2.0 * ((true[0] @ true[1].T) @ true[2].T)
    want = want * true[3] if gain else want
    named = zip(("y", "dx", "dA", "dB", "dg"), run(y, ours), run(want, true), run(y_plain, plain), strict=False)
    for name, got, exact, reference in named:
        assert_as_good(got.detach(), exact.detach(), reference.detach(), name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gain_p", [None, 0.3])
def test_nan_and_inf_propagate(bad, gain_p):
    leaves, W, b, terms, _ = problem([{"dropout": 0.4}], gain_p)
    with torch.no_grad():
        leaves["x"][2, 1] = bad
    y = adapted_linear(leaves["x"], W, b, terms, seed=SEED)
    assert not y[2].isfinite().any() and y[[0, 1, 3, 4]].isfinite().all()
    y.sum().backward()
    assert not leaves["A0"].grad[:, 1].isfinite().any()


@pytest.mark.parametrize("gain_p", [None, 0.0, 0.3])
def test_inplace_relu_after_the_layer(gain_p):
    leaves, W, b, terms, dense = problem([{"dropout": 0.4}], gain_p)
    assert_same(leaves, adapted_linear(leaves["x"], W, b, terms, seed=SEED).relu_(), dense().relu())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("gain_p", [None, 0.3])
def test_checkpointing_replays_dropout(reentrant, gain_p):
    leaves, W, b, terms, _ = problem([{"dropout": 0.4}], gain_p)
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        f = lambda x: adapted_linear(x, W, b, terms)  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(f, leaves["x"], use_reentrant=reentrant) if checkpointed else f(leaves["x"])
        y.square().sum().backward()
        runs.append([y.detach()] + [leaf.grad for leaf in leaves.values()])
        for leaf in leaves.values():
            leaf.grad = None
    for name, a, b in zip(("y", *leaves), *runs, strict=True):
        assert torch.equal(a, b), name
