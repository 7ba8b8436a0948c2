"""LoKr against its formula and stock PEFT: values, gradients, halves, splits, row dropout, folders in both directions, faults."""

from __future__ import annotations

import json

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from safetensors.torch import load_file
from test_memory import saved_bytes
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.job.arms import FASTPEFT, PEFT, peft_counterpart
from fastpeft.job.layerbench import Shape, layers
from fastpeft.method import lokr
from fastpeft.terms import Dense, Kron, delta_weight

pytest.importorskip("peft")
import peft
from peft.tuners.lokr.layer import factorization as peft_factorization
from peft_layers import LEADS, moved
from test_loha import compare, double

IN, OUT, ALPHA = 24, 20, 7.0
NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def built(size_in=IN, size_out=OUT, **options):
    """(layer, its LoKr) in training mode, every factor away from its start."""
    layer = moved(fastpeft.AdaptedLinear(size_in, size_out, method="lokr", **({"dtype": DT, "alpha": ALPHA} | options)))
    return layer, layer.adapter.lokr


def factors(m):
    return {name: getattr(m, name) for name in NAMES if getattr(m, name) is not None}


# ---- values and gradients


def check_paper(lead=(3, 5), rank=2, s=ALPHA / 2, **options):
    torch.manual_seed(3)
    layer, m = built(rank=rank, **options)
    x = rand(*lead, IN)
    own = factors(m) | {"x": x}
    compare(layer(x), papers.lokr(x, layer.weight, layer.bias, factors(m), s), own, own)


@pytest.mark.parametrize("lead", [*LEADS, (), (2, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [dict(rank=1), dict(rank=1, decompose_both=True), dict(rank=50), dict(rank=2, factor=2, bias=False)], ids=str
)
def test_equals_the_formula(options, lead):
    check_paper(lead, s=ALPHA / options["rank"], **options)


def test_gradcheck():
    layer, m = built(6, 4, rank=1, decompose_both=True)
    names, x = list(factors(m)), rand(2, 6)

    def f(x, *own):
        return torch.func.functional_call(layer, {f"adapter.lokr.{n}": p for n, p in zip(names, own, strict=True)}, (x,))

    assert torch.autograd.gradcheck(f, (x, *factors(m).values()))


def stock(layer, **fields):
    """PEFT's LoKr over the layer's weight and bias with the layer's factors, and those factors, in training mode."""
    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=DT)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    own = factors(layer.adapter.lokr)
    config = peft.LoKrConfig(target_modules=["0"], **fields)
    theirs = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0].to(DT)
    held = {name: getattr(theirs, f"lokr_{name}") for name in NAMES}
    live = {name: p["default"] for name, p in held.items() if "default" in p}
    assert set(live) == set(own), "another half is full there"
    with torch.no_grad():
        for name, p in own.items():
            assert live[name].shape == p.shape, (name, live[name].shape, p.shape)
            live[name].copy_(p)
    return theirs.train(), live


def check_peft(first=0):
    """40 layers of random shape, rank, factor, halves, alpha, bias and leading dimensions; the case's number is its seed."""
    for case in range(first, first + 40):
        g = torch.Generator().manual_seed(case)
        torch.manual_seed(case)
        draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: B023, E731
        size_in, size_out = draw(1, 60), draw(1, 60)
        rank, alpha = draw(1, 12), draw(1, 400) / 10
        factor, both, bias = (-1, -1, draw(1, 30))[draw(0, 2)], bool(draw(0, 1)), bool(draw(0, 1))
        lead = [(), (draw(1, 30),), (draw(1, 5), draw(1, 7)), (2, draw(1, 3), 2)][draw(0, 3)]
        layer, m = built(size_in, size_out, rank=rank, alpha=alpha, factor=factor, decompose_both=both, bias=bias)
        theirs, live = stock(layer, r=rank, alpha=alpha, decompose_factor=factor, decompose_both=both)
        x = rand(*lead, size_in)
        case_name = f"{case}: {size_in} -> {size_out}, {rank=}, {alpha=}, {factor=}, {both=}"
        with double():
            compare(layer(x), theirs(x), factors(m) | {"x": x}, live | {"x": x}, case_name)


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_equals_peft_on_random_layers(first):
    check_peft(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 64])
def test_as_good_as_plain_pytorch(dtype, rank):
    """Output and gradients against the formula in fp64, beside the formula in the layer's dtype."""
    torch.manual_seed(4)
    layer, m = built(1024, 768, rank=rank, dtype=dtype)
    own = factors(m)
    assert {p.dtype for p in own.values()} == {torch.float32}
    x, d = torch.randn(64, 1024, dtype=dtype), torch.randn(64, 768, dtype=dtype)
    seen = []
    for kind in ("ours", "exact", "plain"):
        leaf = (x.double() if kind == "exact" else x).requires_grad_()
        to = leaf.dtype
        formula = lambda: papers.lokr(leaf, layer.weight.to(to), layer.bias.to(to), {n: p.to(to) for n, p in own.items()}, ALPHA / rank)  # noqa: B023, E731
        y = layer(leaf) if kind == "ours" else formula()
        seen.append({"y": y} | dict(zip(("x", *own), torch.autograd.grad(y, (leaf, *own.values()), d.to(to)), strict=True)))
    for name, got in seen[0].items():
        assert_as_good(got, seen[1][name].double(), seen[2][name], name)


# ---- splits, scale, start, size


def test_factorization_is_pefts():
    wrong = [(n, f) for n in range(1, 600) for f in (-1, *range(1, 40))
             if lokr.factorization(n, f, "peft") != tuple(peft_factorization(n, f))]  # fmt: skip
    assert not wrong, wrong[:9]


def test_known_splits():
    table = {768: (24, 32), 1024: (32, 32), 4096: (64, 64), 5120: (64, 80), 8192: (64, 128), 11008: (86, 128), 14336: (112, 128)}
    assert {n: lokr.factorization(n, -1, "peft") for n in table} == table
    assert lokr.factorization(13, -1, "peft") == (1, 13)
    assert lokr.factorization(64, 16, "peft") == (16, 4) and lokr.factorization(64, 16, "lycoris") == (4, 16)


@pytest.mark.parametrize(
    ("options", "count"), [(dict(rank=10000), 8192), (dict(rank=8), 5120), (dict(rank=8, decompose_both=True), 2048)], ids=str
)
def test_sizes_of_the_specification(options, count):
    layer = fastpeft.AdaptedLinear(4096, 4096, method="lokr", bias=False, device="meta", **options)
    assert sum(p.numel() for p in layer.adapter.parameters()) == count


SCALES = [
    (dict(), 1.0),
    (dict(rank=2, alpha=6), 3.0),
    (dict(rank=50, alpha=25), 0.5),
    (dict(flavor="lycoris", rank=50, alpha=25), 1.0),
    (dict(flavor="lycoris", rank=1, full_matrix=True, alpha=25), 1.0),
    (dict(flavor="lycoris", rank=2, alpha=None), 1.0),
    (dict(flavor="lycoris", rank=4, factor=2, alpha=6, rslora=True), 3.0),
]


@pytest.mark.parametrize(("options", "scale"), SCALES, ids=str)
def test_scale(options, scale):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="lokr", dtype=DT, **options))
    m = layer.adapter.lokr
    assert m.scale == scale
    x = rand(4, IN)
    assert_fp64(layer(x), papers.lokr(x, layer.weight, layer.bias, factors(m), scale))


def test_unbalanced_swaps_the_split_of_out():
    plain, swapped = (
        fastpeft.AdaptedLinear(24, 48, method="lokr", flavor="lycoris", full_matrix=True, unbalanced=u).adapter.lokr
        for u in (False, True)
    )
    assert (plain.w1.shape, plain.w2.shape) == ((6, 4), (8, 6))
    assert (swapped.w1.shape, swapped.w2.shape) == ((8, 4), (6, 6))


@pytest.mark.parametrize(
    ("flavor", "both", "zero"), [("peft", False, "w1"), ("peft", True, "w1_a"), ("lycoris", False, "w2_b"), ("lycoris", True, "w2_b")]
)
def test_starts_at_the_base_with_one_zero_factor(flavor, both, zero):
    layer = fastpeft.AdaptedLinear(400, 900, method="lokr", rank=2, decompose_both=both, flavor=flavor, dtype=DT)
    own = factors(layer.adapter.lokr)
    assert [n for n, p in own.items() if not p.any()] == [zero]
    for name, p in own.items():
        if name != zero:
            bound = p.shape[1] ** -0.5
            assert 0.8 * bound < p.abs().max() <= bound, name
            assert abs(p.std() - bound / 3**0.5) < 6 * bound / (p.numel() * 2) ** 0.5, name
    x = rand(6, 400)
    assert_fp64(layer(x), papers.linear(x, layer.weight, layer.bias))
    layer(x).square().sum().backward()
    assert own[zero].grad.any()


def test_keeps_x_alone_and_its_rank_is_the_product():
    layer = moved(fastpeft.AdaptedLinear(64, 96, method="lokr", rank=2))
    x = torch.randn(512, 64, requires_grad=True)
    # w2 = w2_a w2_b is formed by autograd, [12, 8]
    assert saved_bytes(lambda: layer(x), layer) == 4 * (512 * 64 + 12 * 8)
    (term,) = layer.adapter.lokr.terms(Plain(layer.weight))
    assert isinstance(term, Kron)
    ranks = [torch.linalg.matrix_rank(f.double(), rtol=1e-6) for f in (term.C, term.D)]
    assert torch.linalg.matrix_rank(delta_weight(term, DT), rtol=1e-6) == ranks[0] * ranks[1] == 8 * 2


# ---- dropout


@pytest.mark.parametrize("rescale", [False, True])
def test_rank_dropout_drops_rows_as_in_peft(rescale):
    torch.manual_seed(6)
    layer, m = built(rank=1, rank_dropout=0.4, rank_dropout_scale=rescale)
    theirs, _ = stock(layer, r=1, alpha=ALPHA, rank_dropout=0.4, rank_dropout_scale=rescale)
    assert isinstance(m.terms(Plain(layer.weight))[0], Dense)
    x, torn = rand(4, IN), 0

    def formula(rows):
        delta = ALPHA * torch.kron(m.w1, m.w2_a @ m.w2_b if m.w2 is None else m.w2)
        return papers.linear(x, layer.weight + delta * rows[:, None], layer.bias)

    for seed in range(6):
        torch.manual_seed(seed)
        torch.rand(1)  # PEFT draws for the whole module even where its probability is zero, fastpeft does not
        state = torch.get_rng_state()
        kept = (torch.rand(OUT) > 0.4).float()
        torn += not kept.all()
        torch.manual_seed(seed)
        # PEFT's share of rows kept is rounded to fp32
        assert_fp64(theirs(x), formula((kept / kept.mean() if rescale else kept).double()), "PEFT")
        torch.set_rng_state(state)
        own = factors(m) | {"x": x}
        compare(layer(x), formula(kept.double() / kept.double().mean() if rescale else kept.double()), own, own, f"seed {seed}")
    assert torn == 6


def test_module_dropout_drops_all_or_nothing():
    layer, _ = built(rank=2, module_dropout=0.3)
    x = rand(4, IN)
    base, full, dropped = papers.linear(x, layer.weight, layer.bias), layer.eval()(x), 0
    layer.train()
    for seed in range(200):
        torch.manual_seed(seed)
        y = layer(x)
        torch.manual_seed(seed)
        expected = full if torch.rand(1) > 0.3 else base
        assert_fp64(y, expected)
        dropped += expected is base
    assert abs(dropped / 200 - 0.3) < 6 * (0.3 * 0.7 / 200) ** 0.5


# ---- planted faults


def halves_swapped(monkeypatch):
    real = lokr.Kron
    monkeypatch.setattr(lokr, "Kron", lambda C, D, s: real(D, C, s))


def scale_missing(monkeypatch):
    monkeypatch.setattr(lokr, "scaling", lambda rank, alpha, rslora: 1.0)


def ascending_splits(monkeypatch):
    real = lokr.factorization
    monkeypatch.setattr(lokr, "factorization", lambda n, f, flavor: real(n, f, "lycoris"))


@pytest.mark.parametrize(
    ("plant", "check"),
    [(halves_swapped, check_paper), (scale_missing, check_paper), (scale_missing, check_peft), (ascending_splits, check_peft)],
)
def test_planted_fault_is_found(plant, check, monkeypatch):
    with monkeypatch.context() as planted:
        plant(planted)
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            check()
    check()


# ---- folders


IO = {
    "plain": dict(rank=3),
    "both": dict(rank=1, decompose_both=True),
    "full": dict(rank=1000, alpha=3.0),
    "factor": dict(rank=2, factor=4, alpha=5.0),
}
FIELDS = {"rank": "r", "factor": "decompose_factor"}


def plain_mlp():
    torch.manual_seed(9)
    return MLP()


@pytest.mark.parametrize("case", IO)
def test_stock_peft_loads_our_folder(case, tmp_path):
    model, x = plain_mlp(), rand(5, 16)
    fastpeft.adapt(model, "lokr", **IO[case])
    perturb(model).eval()
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOKR"
    with double():
        theirs = peft.PeftModel.from_pretrained(plain_mlp(), tmp_path, autocast_adapter_dtype=False).double().eval()
        assert_fp64(theirs(x), model(x))


@pytest.mark.parametrize("case", IO)
def test_we_load_stock_pefts_folder(case, tmp_path):
    config = peft.LoKrConfig(target_modules=["up", "down"], **{FIELDS.get(k, k): v for k, v in IO[case].items()})
    theirs, x = peft.get_peft_model(plain_mlp(), config, autocast_adapter_dtype=False), rand(5, 16)
    perturb(theirs).double().eval()
    theirs.save_pretrained(tmp_path)
    model = plain_mlp()
    fastpeft.load_adapter(model, tmp_path)
    with double():
        assert_fp64(model.eval()(x), theirs(x))


def test_a_config_object_is_read():
    model = plain_mlp()
    report = fastpeft.adapt(model, peft.LoKrConfig(target_modules=["up"], r=2, alpha=6, decompose_factor=4, decompose_both=True))
    assert list(report.layers) == ["up"]
    assert model.up.adapter.lokr.scale == 3.0 and model.up.adapter.lokr.w2_a is not None


def test_the_other_flavour_keeps_its_own_format(tmp_path):
    model, x = plain_mlp(), rand(5, 16)
    fastpeft.adapt(model, "lokr", rank=2, flavor="lycoris", alpha=None)
    perturb(model).eval()
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "FASTPEFT"
    again = plain_mlp()
    fastpeft.load_adapter(again, tmp_path)
    assert torch.equal(again.eval()(x), model(x))


@pytest.mark.parametrize("case", IO)
def test_exports_to_a_plain_lora(case, tmp_path):
    model, x = plain_mlp(), rand(5, 16)
    fastpeft.adapt(model, "lokr", **IO[case])
    perturb(model).eval()
    fastpeft.export_lora(model, tmp_path)
    ranks = [v.shape[0] for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_A" in k]
    assert max(ranks) <= 16
    theirs = peft.PeftModel.from_pretrained(plain_mlp(), tmp_path, autocast_adapter_dtype=False).double().eval()
    assert_fp64(theirs(x), model(x))


FAULTS = [
    (dict(rank=0), "rank=0"),
    (dict(factor=0), "factor=0"),
    (dict(factor=-2), "factor=-2"),
    (dict(flavor="other"), "flavor"),
    (dict(full_matrix=True), "lycoris"),
    (dict(alpha=None), "lycoris"),
    (dict(rank_dropout=1.0), "rank_dropout"),
]


@pytest.mark.parametrize(("options", "word"), FAULTS, ids=str)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        fastpeft.AdaptedLinear(IN, OUT, method="lokr", **options)


def test_the_bench_knows_its_peer():
    assert peft_counterpart("lokr")
    assert {FASTPEFT, PEFT} <= set(layers(Shape(8, 16, 12), "lokr", {"rank": 2}))
