"""KronA_B and KronA_B_res against the paper's formula: every option, start, parameter count, dtype and file."""

from __future__ import annotations

import itertools
import json
import math

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.registry import Site, get_recipe

BOTH = ("krona_b", "krona_b_res")
SPLITS = [None, (4, 4), (2, 8), (8, 2), (16, 1), (1, 16), (1, 1), (16, 16)]
both = pytest.mark.parametrize("method", BOTH)


class Block(nn.Module):
    def __init__(self, dtype=DT):
        super().__init__()
        self.mlp = MLP(dtype=dtype)

    def forward(self, x):
        return self.mlp(x)


def adapted(method, dtype=DT, **options):
    model = Block(dtype)
    fastpeft.adapt(model, method, **options)
    return model, model.mlp.adapter.get_submodule(method)


def plain(block, x):
    """The FFN without its adapter."""
    return block.mlp.down(torch.tanh(block.mlp.up(x)))


def formula(block, m, x, s):
    return papers.krona_b(x, lambda x: plain(block, x), m.A, m.B, s, m.bias, getattr(m, "s_res", 0.0))


def own(m):
    return {n: p for n, p in m.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "a", "krona_bias"), list(itertools.product(BOTH, SPLITS, [False, True])))
def test_formula_and_every_gradient(method, a, krona_bias):
    model, m = adapted(method, shape=a, scale=1.7, krona_bias=krona_bias)
    perturb(model)
    for shape in ((16,), (5, 16), (2, 3, 16)):
        x = rand(*shape)
        got, want = model(x), formula(model, m, x, 1.7)
        assert_fp64(got, want, f"y {shape}")
        leaves = own(m) | {"x": x}
        d = torch.randn_like(want)
        pairs = zip(
            leaves, *(torch.autograd.grad(y, list(leaves.values()), d) for y in (got, want)), strict=True
        )
        for name, g, w in pairs:
            assert_fp64(g, w, f"{name} {shape}")


@both
def test_an_empty_batch(method):
    """An expert that no token was sent to."""
    model, m = adapted(method, krona_bias=True)
    x = rand(0, 16)
    y = model(x)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert x.grad.shape == (0, 16) and all(not p.grad.any() for p in own(m).values())


def test_a_and_b_are_not_interchangeable():
    """A row of A strides over the hidden units in steps of b1: the product is A o B and not B o A."""
    model, m = adapted("krona_b", shape=(2, 8))
    with torch.no_grad():
        m.A.zero_()[1, 3] = 5.0
        m.B.zero_()[6, 1] = 1.0
    x = rand(4, 16, grad=False)
    want = plain(model, x)
    want[:, 3 * 2 + 1] += 5.0 * x[:, 1 * 8 + 6]
    assert_fp64(model(x), want)


@pytest.mark.parametrize(
    ("a", "count"), [((32, 24), 1536), (None, 1536), ((24, 24), 1600), ((768, 768), 589825)]
)
def test_parameter_count_of_768(a, count):
    for method, more in (("krona_b", 0), ("krona_b_res", 1)):
        model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(768, 4), nn.Linear(4, 768))})
        report = fastpeft.adapt(model, method, shape=a)
        assert report.trainable == report.layers["mlp"].trainable == count + more
        m = model["mlp"].adapter.get_submodule(method)
        assert (m.A.shape[0] * m.B.shape[0], m.A.shape[1] * m.B.shape[1]) == (768, 768)


@pytest.mark.parametrize(
    ("size", "a"), [(768, (32, 24)), (16, (4, 4)), (4096, (64, 64)), (13, (13, 1)), (1, (1, 1))]
)
def test_the_default_split_is_the_most_even(size, a):
    m = get_recipe("krona_b").build(Site("x", Plain(torch.empty(size, size)), torch.float32), {})
    assert tuple(m.A.shape) == a and tuple(m.B.shape) == (size // a[0], size // a[1])


def test_starts():
    """A is uniform on +-1/sqrt(a2) (Kaiming uniform, a = sqrt 5), B and the bias are zero, s_res is 1 as published."""
    m = get_recipe("krona_b_res").build(
        Site("x", Plain(torch.empty(4096, 4096)), torch.float32), {"krona_bias": True}
    )
    assert not m.B.any() and not m.bias.any() and m.s_res.tolist() == [1.0]
    bound = 1 / math.sqrt(64)
    assert 0.95 * bound < m.A.abs().max() <= bound and m.A.mean().abs() < 0.05 * bound
    model, x = Block(), rand(5, 16)
    want = model(x)
    fastpeft.adapt(model, "krona_b_res")
    assert_fp64(model(x), want + x, "published start")
    fastpeft.unload(model)
    for method, options in (("krona_b_res", {"res_init": 0.0}), ("krona_b", {})):
        fastpeft.adapt(model, method, **options)
        assert torch.equal(model(x), want), method
        fastpeft.unload(model)


BAD = [
    (dict(shape=(5, 4)), ValueError, r"shape=\(5, 4\) at 'mlp'.*5 does not divide 16"),
    (dict(shape=(4, 32)), ValueError, r"shape a2=32 at 'mlp'.*1 to 16"),
    (dict(shape=(0, 4)), ValueError, r"shape a1=0"),
    (dict(shape=(4.0, 4)), TypeError, r"shape a1=4.0"),
    (dict(shape=(4,)), TypeError, "pair"),
    (dict(shape=4), TypeError, "pair"),
    (dict(scale=float("nan")), ValueError, "scale=nan"),
    (dict(rank=4), ValueError, "'rank' does not exist"),
    (dict(bias=True), ValueError, "bias=True"),
    (dict(bias="lora_only"), ValueError, "lora_only.*krona_b"),
    (dict(quantize="nf4"), ValueError, "quantize='nf4'.*krona_b has none"),
    (dict(rank_pattern={"mlp": 3}), ValueError, "rank_pattern.*no option 'rank'"),
    (dict(res_init=0.0), ValueError, "'res_init' does not exist"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), BAD, ids=lambda o: str(o) if isinstance(o, dict) else ""
)
def test_wrong_options_change_nothing(options, error, message):
    model = Block()
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        fastpeft.adapt(model, "krona_b", **options)
    assert list(model.state_dict()) == keys and not model.mlp._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_res_init_is_finite_and_a_linear_is_no_place():
    with pytest.raises(ValueError, match="res_init=inf"):
        fastpeft.adapt(Block(), "krona_b_res", res_init=float("inf"))
    with pytest.raises(ValueError, match=r"krona_b sits beside a whole ffn.*fastpeft.adapt"):
        fastpeft.AdaptedLinear(16, 16, method="krona_b")


@both
def test_bf16_is_as_good_as_plain_pytorch(method):
    """A bf16 model has fp32 parameters, and s_res keeps the digits that bf16 has not."""
    model, m = adapted(method, torch.bfloat16, krona_bias=True)
    perturb(model)
    if method == "krona_b_res":
        m.s_res.data.fill_(1.001)
    assert all(p.dtype == torch.float32 for p in own(m).values())
    x = torch.randn(7, 9, 16).bfloat16().requires_grad_()
    y = model(x)
    assert y.dtype == torch.bfloat16
    d = torch.randn_like(y)
    got = torch.autograd.grad(y, [*own(m).values(), x], d)

    def oracle(dtype):
        """The formula in dtype on the FFN's own bf16 output, whose gradient the FFN carries to x in bf16 as well."""
        leaves = {n: p.detach().to(dtype).requires_grad_() for n, p in own(m).items()}
        x2 = x.detach().to(dtype).requires_grad_()
        base = x.detach().requires_grad_()
        ffn = plain(model, base)
        y = papers.krona_b(
            x2,
            lambda _: ffn.to(dtype),
            leaves["A"],
            leaves["B"],
            1.0,
            leaves["bias"],
            leaves.get("s_res", 0.0),
        )
        grads = list(torch.autograd.grad(y, [*leaves.values(), x2, base], d.to(dtype)))
        through = grads.pop()
        grads[-1] = grads[-1] + through.to(dtype)
        return y, grads

    (want, wants), (rough, roughs) = oracle(torch.float64), oracle(torch.bfloat16)
    assert_as_good(y, want, rough, "y")
    for name, g, w, r in zip([*own(m), "x"], got, wants, roughs, strict=True):
        # a parameter's gradient is fp32: it may not be worse than the bf16 composition's
        assert_as_good(g.to(r.dtype), w, r, name)


@both
def test_autocast_keeps_the_ffns_dtype(method):
    model, m = adapted(method, torch.float32)
    perturb(model)
    x = torch.randn(6, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        assert y.dtype == plain(model, x).dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any()
        for p in [*own(m).values(), x]
    )
    want = formula(model, m, x, 1.0)
    rough = (want - y.float()).abs().max() / want.abs().max()
    assert rough < 16 * torch.finfo(torch.bfloat16).eps, "more than a few roundings of bf16"


def test_autocast_lowers_nothing_beside_an_ffn_that_stays_wide():
    """An FFN that ends in fp32 (as one with a norm does) gets its sum in fp32."""
    model, m = adapted("krona_b", torch.float32)
    real = model.mlp.forward
    model.mlp.forward = lambda x: real(x).float()
    perturb(model)
    x = torch.randn(50, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, base = model(x), plain(model, x).float()
    want = papers.krona_b(x.double(), lambda _: base.double(), m.A.double(), m.B.double(), 1.0)
    assert_as_good(got, want, papers.krona_b(x, lambda _: base, m.A, m.B, 1.0), "y")


def test_s_res_is_not_rounded_to_bf16():
    """1.003 is 1.0 in bf16; over many tokens the outputs say which of the two was used."""
    model, m = adapted("krona_b_res", torch.bfloat16)
    with torch.no_grad():
        for p in model.mlp.down.parameters():
            p.zero_()
        m.s_res.fill_(1.003)
    x = torch.randn(4000, 16).bfloat16()
    y = model(x)
    X = x.double()
    assert abs((y.double() * X).sum() / X.square().sum() - 1.003) < 3e-4
    y.backward(x)
    # a sum of 64000 products in fp32; in bf16 the last rounding alone is off by up to 4e-3
    assert abs(m.s_res.grad.item() / X.square().sum() - 1) < 1e-5


@both
def test_no_merge_and_no_export(method, tmp_path):
    model, _ = adapted(method)
    perturb(model)
    x = rand(3, 16)
    want = model(x)
    with pytest.raises(ValueError, match=f"merge: {method} at 'mlp' stands beside"):
        fastpeft.merge(model)
    with pytest.raises(ValueError, match=f"export_lora: {method} at 'mlp' stands beside"):
        fastpeft.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists() and torch.equal(model(x), want)
    info = {i.name: i for i in fastpeft.methods()}[method]
    assert (info.site, info.mergeable, info.exportable, info.terms) == ("ffn", False, False, ("Kron",))
    assert "ffn" in str(fastpeft.methods())


@both
def test_file_of_its_own(method, tmp_path):
    model, _ = adapted(method, shape=(2, 8), scale=0.5, krona_bias=True)
    perturb(model)
    fastpeft.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["library"], config["peft_type"], config["target_modules"]) == (
        "fastpeft",
        method.upper(),
        ["mlp"],
    )
    x = rand(3, 16)
    fresh = Block()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapter." not in k})
    fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    # onto a model that is adapted already: the pair is a list in the file
    again, _ = adapted(method, shape=(2, 8), scale=0.5, krona_bias=True)
    again.load_state_dict(
        model.state_dict() | {k: torch.zeros_like(v) for k, v in model.state_dict().items() if "adapter" in k}
    )
    fastpeft.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))
    other, _ = adapted(method, shape=(8, 2), scale=0.5, krona_bias=True)
    with pytest.raises(fastpeft.CheckpointError, match=r"other options.*'shape'"):
        fastpeft.load_adapter(other, tmp_path)
