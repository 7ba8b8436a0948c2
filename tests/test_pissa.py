"""PiSSA against stock PEFT and the dense formula: start, output, gradients, conversion to a plain LoRA, folders, small steps in bf16."""

from __future__ import annotations

import copy
import json
import math
import warnings

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from safetensors.torch import load_file
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft.adapter import base_of
from fastpeft.start.pissa import principal
from fastpeft.terms import LowRank

pytest.importorskip("peft")
import peft
from peft_layers import peft_logits
from test_loftq import assert_stored, toy

IN, OUT, RANK = 24, 20, 4
SCALES = [dict(alpha=4.0), dict(alpha=6.0), dict(alpha=3.0, rslora=True)]


def scale_of(alpha, rslora=False):
    return alpha / math.sqrt(RANK) if rslora else alpha / RANK


def built(dtype=DT, **options):
    torch.manual_seed(0)
    layer = fastpeft.AdaptedLinear(IN, OUT, method="pissa", rank=RANK, dtype=dtype, **({"alpha": 4.0} | options))
    return layer, layer.adapter.pissa


def stock(layer, alpha, rslora=False, start="pissa"):
    """PEFT's model over layer's weight and bias, at its own start. fp32: PEFT's PiSSA takes no fp64."""
    base = nn.Sequential(nn.Linear(IN, OUT))
    base[0].load_state_dict({k: v.float() for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    config = peft.LoraConfig(r=RANK, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=start, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    return model, model.base_model.model[0]


def parts_of(theirs):
    return theirs.base_layer.weight, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight


@pytest.mark.parametrize("options", SCALES, ids=str)
def test_starts_as_in_peft(options):
    """s B0 A0 and W - s B0 A0 of a fp32 layer are as near to the exact ones as PEFT's. (Factors have no sign of their own.)"""
    layer, m = built(torch.float32, **options)
    folded = fastpeft.AdaptedLinear.from_linear(layer, "pissa", rank=RANK, fold=True, **options)
    residual, A, B = parts_of(stock(layer, **options)[1])
    s, W = scale_of(**options), layer.weight.detach().double()
    with torch.no_grad():
        top = papers.principal(W, RANK)
        assert_as_good(s * m.B0 @ m.A0, top, s * B @ A, "s B0 A0")
        assert_as_good(folded.adapter.base.weight, W - top, residual, "W - s B0 A0")


@pytest.mark.parametrize("options", SCALES, ids=str)
def test_factors_and_residual(options):
    """Rows of A and columns of B have norm sqrt(S_i / s); the residual's singular values are those of W after the first r."""
    layer, m = built(**options)
    S, s = torch.linalg.svdvals(layer.weight), scale_of(**options)
    for norms in (m.A.norm(dim=1), m.B.norm(dim=0)):
        assert_fp64(norms, (S[:RANK] / s).sqrt())
    rest = torch.linalg.svdvals(layer.weight - s * m.B0 @ m.A0)
    assert_fp64(rest, torch.cat([S[RANK:], S.new_zeros(RANK)]))


@pytest.mark.parametrize("options", [*SCALES, dict(alpha=6.0, fold=True), dict(alpha=3.0, rslora=True, fold=True)], ids=str)
def test_output_and_gradients_are_the_formula(options):
    layer, m = built(**options)
    perturb(layer)
    x, s = rand(3, 7, IN), scale_of(**{k: v for k, v in options.items() if k != "fold"})
    got, want = layer(x), papers.pissa(x, layer.weight, layer.bias, m.A, m.B, s)
    d = torch.randn_like(got)
    assert_fp64(got, want, "y")
    leaves = (x, m.A, m.B)
    for name, g, w in zip("xAB", torch.autograd.grad(got, leaves, d), torch.autograd.grad(want, leaves, d), strict=True):
        assert_fp64(g, w, name)


@pytest.mark.parametrize("options", SCALES, ids=str)
def test_output_and_gradients_are_those_of_peft(options):
    """After the same steps away from the same start, in fp64."""
    layer, m = built(**options)
    _, theirs = stock(layer, **options)
    theirs = theirs.double()
    s = scale_of(**options)
    with torch.no_grad():
        residual, A, B = parts_of(theirs)
        m.A0.copy_(A), m.B0.copy_(B)
        layer.weight.copy_(residual + s * B @ A), layer.bias.copy_(theirs.base_layer.bias)
        for mine, p in ((m.A, A), (m.B, B)):
            p.add_(0.1 * torch.randn_like(p))
            mine.copy_(p)
    x = rand(5, IN)
    got, want = layer(x), theirs(x)
    assert_fp64(got, want, "y")
    d = torch.randn_like(got)
    other = torch.autograd.grad(want, (x, A, B), d)
    for name, g, w in zip("xAB", torch.autograd.grad(got, (x, m.A, m.B), d), other, strict=True):
        assert_fp64(g, w, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_starts_at_the_base_to_the_bit(dtype):
    layer, m = built(dtype)
    x = torch.randn(7, IN, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert m.A.dtype == torch.promote_types(dtype, torch.float32) and m.A.any()


def test_both_factors_move_at_the_first_step():
    """LoRA's A has no gradient there."""
    layer, m = built()
    layer(rand(9, IN)).square().sum().backward()
    assert m.A.grad.norm() > 0.01 and m.B.grad.norm() > 0.01


def test_small_steps_survive_16_bits():
    """Factors moved by 1e-3 of their size, over a base of zeros: y is what was learned. Said as B A - B0 A0 it drowns."""
    U, V = (torch.linalg.qr(torch.randn(256, 256, dtype=DT))[0] for _ in "UV")
    linear = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    linear.weight.data = (U / torch.arange(1, 257) @ V).bfloat16()
    layer = fastpeft.AdaptedLinear.from_linear(linear, "pissa", rank=32, alpha=32)
    m, x = layer.adapter.pissa, torch.eye(256, dtype=torch.bfloat16)
    with torch.no_grad():
        linear.weight.zero_()
        for p in (m.A, m.B):
            p.add_(1e-3 * p.abs().mean() * torch.randn_like(p))
        want = (m.B.double() @ m.A.double() - m.B0.double() @ m.A0.double()).T
        apart = LowRank(torch.cat([m.A, m.A0]), torch.cat([m.B, -m.B0], 1))
        for y, good in ((layer(x), True), (fastpeft.adapted_linear(x, linear.weight, None, [apart]), False)):
            error = (y.double() - want).norm() / want.norm()
            # bf16 rounds a number by up to 2^-9 of its size: x A^T, B and y once each
            assert (error < 3 * 2**-9) == good, error


@pytest.mark.parametrize("options", [SCALES[1], SCALES[2]], ids=str)
def test_folder_is_the_conversion_that_peft_makes(options, tmp_path):
    """[A; A0], [B | -B0] of twice the rank, with the alpha that keeps s: PEFT's save_pretrained from the same state."""
    layer, _ = built(**options)
    model, theirs = stock(layer, **options)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "begin")
    ours = nn.Sequential(copy.deepcopy(theirs.base_layer))
    fastpeft.adapt(ours, "pissa", rank=RANK, **options)
    own = ours[0].adapter.pissa
    with torch.no_grad():
        _, A, B = parts_of(theirs)
        own.A0.copy_(A), own.B0.copy_(B)
        for p, q in ((A, own.A), (B, own.B)):
            p.add_(0.1 * torch.randn_like(p))
            q.copy_(p)
    # PEFT asks the config whether there is something to convert
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "begin"))
    fastpeft.save_adapter(ours, tmp_path / "ours")
    (got, want), (mine, wanted) = (
        [read(tmp_path / who) for who in ("ours", "theirs")]
        for read in (lambda f: load_file(f / "adapter_model.safetensors"), lambda f: json.loads((f / "adapter_config.json").read_text()))
    )
    assert got.keys() == want.keys() and len(got) == 2
    for key in want:
        assert torch.equal(got[key], want[key]), key
    assert mine["r"] == wanted["r"] == 2 * RANK and mine["init_lora_weights"] is wanted["init_lora_weights"] is True
    assert mine["use_rslora"] == wanted["use_rslora"] and math.isclose(mine["lora_alpha"], wanted["lora_alpha"])


def adapted(options, dtype=DT):
    plain = MLP(dtype)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "pissa", **options)
    return plain, perturb(model).eval()


PATTERNS = dict(rank=3, alpha=5, rank_pattern={"up": 5}, alpha_pattern={"down": 2.5})


@pytest.mark.parametrize("options", [dict(rank=4, alpha=6), PATTERNS, PATTERNS | dict(rslora=True)], ids=str)
@pytest.mark.parametrize("write", [fastpeft.save_adapter, fastpeft.export_lora])
def test_stock_peft_computes_the_same_on_the_original_weights(options, write, tmp_path):
    plain, model = adapted(options)
    x = rand(5, 16)
    write(model, tmp_path)
    assert_fp64(peft_logits(plain, tmp_path, x), model(x), "y")
    assert_fp64(fastpeft.merge(copy.deepcopy(model))(x), model(x), "merged")


@pytest.mark.parametrize("options", [dict(rank=4, alpha=6), PATTERNS, PATTERNS | dict(rslora=True)], ids=str)
def test_training_goes_on_from_a_folder(options, tmp_path):
    """A, B, A0 and B0 come back to the bit, into a fresh model and into one that has begun otherwise."""
    plain, model = adapted(options)
    fastpeft.save_adapter(model, tmp_path)
    begun = copy.deepcopy(plain)
    fastpeft.adapt(begun, "pissa", niter=1, **options)
    for other in (plain, begun):
        fastpeft.load_adapter(other, tmp_path)
        for site in ("up", "down"):
            got, want = (getattr(m, site).adapter.pissa.state_dict() for m in (other, model))
            assert list(got) == ["A", "B", "A0", "B0"]
            for key in want:
                assert torch.equal(got[key], want[key]), key
        assert {"A", "B"} == {n.rpartition(".")[2] for n, p in other.named_parameters() if p.requires_grad}


def test_a_folder_that_peft_wrote_again_is_a_lora(tmp_path):
    """Without fastpeft's notes nobody knows what began where: a LoRA of twice the rank, with the same output."""
    plain, model = adapted(dict(rank=4, alpha=6))
    fastpeft.save_adapter(model, tmp_path / "a")
    peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "a")).save_pretrained(tmp_path / "b")
    fastpeft.load_adapter(plain, tmp_path / "b")
    assert plain.up.adapter.names == ("lora",) and plain.up.adapter.lora.A.shape == (8, 16)
    x = rand(5, 16)
    assert_fp64(plain.eval()(x), model(x))


@pytest.mark.parametrize("niter", [1, 4, 16])
def test_randomised_svd(niter):
    """A split is exact whatever the factors are; more iterations come nearer to the leading singular values."""
    torch.manual_seed(0)
    W = torch.randn(256, 192)
    exact = torch.linalg.svdvals(W)[:16]
    ratio = {n: (principal(W, 16, n, seed=0)[0].norm(dim=1).square() / exact).min() for n in (1, niter)}
    # the specification's figures on a flat spectrum of this size: 0.82, 0.93, 0.99 for 1, 4 and 16
    assert {1: 0.75, 4: 0.9, 16: 0.98}[niter] < ratio[niter] < 1.001
    layer, x = nn.Linear(192, 256, dtype=DT), rand(3, 192)
    folded = fastpeft.AdaptedLinear.from_linear(layer, "pissa", rank=16, alpha=16, niter=niter, fold=True)
    assert_fp64(folded(x), layer(x))


def test_seed_of_the_randomised_svd():
    def factor(seed):
        return principal(torch.eye(40), 4, 2, seed)[0]

    before = torch.get_rng_state()
    assert torch.equal(factor(3), factor(3)) and not torch.equal(factor(3), factor(4))
    assert torch.equal(torch.get_rng_state(), before), "a seed must not touch torch's generator"
    assert not torch.equal(factor(None), factor(None))


@pytest.mark.parametrize("options", SCALES, ids=str)
def test_a_peft_config_object(options):
    """adapt(LoraConfig(init_lora_weights="pissa")) begins and computes as PEFT's model does."""
    linear = nn.Sequential(nn.Linear(IN, OUT))
    x = torch.randn(5, IN)
    for start, niter in (("pissa", None), ("pissa_niter_4", 4)):
        s = {"lora_alpha": options["alpha"], "use_rslora": options.get("rslora", False)}
        config = peft.LoraConfig(r=RANK, init_lora_weights=start, target_modules=["0"], **s)
        ours = copy.deepcopy(linear)
        report = fastpeft.adapt(ours, config)
        m = ours[0].adapter.pissa
        assert report.adapted == ["0"] and m.svd == (niter, 0) and m.scale == scale_of(**options)
        theirs = peft.get_peft_model(copy.deepcopy(linear), config)
        want = nn.functional.linear(x.double(), linear[0].weight.double(), linear[0].bias.double())
        assert_as_good(ours(x), want, theirs(x), start)
    for field in ({"lora_dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(ValueError, match=next(iter(field))):
            fastpeft.adapt(copy.deepcopy(linear), peft.LoraConfig(init_lora_weights="pissa", target_modules=["0"], **field))


def test_fold_warns_in_16_bits():
    with pytest.warns(UserWarning, match=r"fold=True rounds .* 'linear' to torch.bfloat16"):
        layer, m = built(torch.bfloat16, fold=True)
    assert set(m.state_dict()) == {"A", "B"} and base_of(layer).dtype is torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built(torch.float32, fold=True)


@pytest.mark.parametrize("bits", [2, 4])
def test_qpissa_is_the_alternation(bits):
    """Q and B A of every round, against the slow one; W - Q - B A shrinks below what quantisation alone and LoftQ leave."""
    W = toy()
    norms = []
    for rounds in (1, 3, 5):
        linear = nn.Linear(64, 48, bias=False, dtype=DT)
        linear.weight.data = W
        layer = fastpeft.AdaptedLinear.from_linear(linear, "pissa", rank=8, alpha=8, bits=bits, iterations=rounds)
        m = layer.adapter.pissa
        Q, low = papers.qpissa(W, 8, rounds, bits)
        assert_stored(base_of(layer).dense(DT), Q)
        assert_stored(m.B @ m.A, low)
        norms.append(nuclear(W - Q - low))
    left = papers.loftq(W, 8, 5, bits)
    assert norms[0] > norms[1] > norms[2]
    assert norms[2] < nuclear(W - sum(left)) < nuclear(W - papers.quantised(W, bits))


def nuclear(M):
    return torch.linalg.matrix_norm(M, "nuc").item()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(rank=0), ValueError, r"pissa: rank=0 at 'linear'"),
        (dict(alpha=0), ValueError, r"pissa: alpha=0 at 'linear'; it must be positive"),
        (dict(niter=-1), ValueError, r"pissa: niter=-1 at 'linear'"),
        (dict(seed=0.5), TypeError, r"pissa: seed=0.5"),
        (dict(bits=4, alpha=16), ValueError, r"bits=4 at 'linear'.*alpha = rank: s is 2.0"),
        (dict(bits=4, fold=True), ValueError, r"takes no fold"),
        (dict(bits=9), ValueError, r"bits=9.*2 to 8"),
        (dict(bits=4, iterations=0), ValueError, r"iterations=0"),
        (dict(dropout=0.1), ValueError, r"'dropout' does not exist for pissa"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(32, 32), "pissa", **options)
