"""LoHa against its formula and stock PEFT: values, gradients, both flavours, row dropout, folders in both directions, faults."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import warnings

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand
from safetensors.torch import load_file, save_file
from test_memory import saved_bytes
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft import CheckpointError
from fastpeft.base import Plain
from fastpeft.job.arms import FASTPEFT, PEFT, peft_counterpart
from fastpeft.job.layerbench import Shape, layers
from fastpeft.method import loha
from fastpeft.ops import khatri_rao
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
import peft
from peft_layers import LEADS, moved, peft_logits
from test_peft_io import OWN_NOTICE, bert, gpt2, logits, shaken

IN, OUT, ALPHA = 13, 10, 7.0
NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def built(size_in=IN, size_out=OUT, **options):
    """(layer, its LoHa) in training mode, every factor away from its start."""
    layer = moved(fastpeft.AdaptedLinear(size_in, size_out, method="loha", **({"dtype": DT, "alpha": ALPHA} | options)))
    return layer, layer.adapter.loha


def factors(m):
    return {name: getattr(m, name) for name in NAMES}


# ---- values and gradients


def check_paper(lead=(3, 5), rank=3, s=ALPHA / 3, size_in=IN, size_out=OUT, **options):
    torch.manual_seed(3)
    layer, m = built(size_in, size_out, rank=rank, **options)
    x = rand(*lead, size_in)
    own = factors(m) | {"x": x}
    compare(layer(x), papers.loha(x, layer.weight, layer.bias, *factors(m).values(), s), own, own)


@pytest.mark.parametrize("lead", [*LEADS, (), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("options", [dict(rank=1), dict(rank=3), dict(rank=9), dict(rank=2, bias=False)], ids=str)
def test_equals_the_formula(options, lead):
    check_paper(lead, s=ALPHA / options["rank"], **options)


@pytest.mark.parametrize("size", [(1, 5), (5, 1), (1, 1), (64, 3), (3, 64)], ids=str)
def test_equals_the_formula_at_narrow_layers(size):
    check_paper(rank=1, s=ALPHA, size_in=size[0], size_out=size[1])


def test_gradcheck():
    layer, m = built(4, 3, rank=2)
    x = rand(2, 4)

    def f(x, *own):
        return torch.func.functional_call(layer, {f"adapter.loha.{n}": p for n, p in zip(NAMES, own, strict=True)}, (x,))

    assert torch.autograd.gradcheck(f, (x, *factors(m).values()))


@contextlib.contextmanager
def double():
    """PEFT makes its scale with torch.tensor(float), which has the default dtype: without this it is rounded to fp32."""
    torch.set_default_dtype(DT)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def stock(layer, **fields):
    """PEFT's LoHa over the layer's weight and bias with the layer's factors, and those factors, in training mode."""
    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=DT)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    own = factors(layer.adapter.loha)
    config = peft.LoHaConfig(target_modules=["0"], r=own["w1_a"].shape[1], **fields)
    theirs = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0].to(DT)
    live = {name: getattr(theirs, f"hada_{name}")["default"] for name in NAMES}
    with torch.no_grad():
        for name, p in own.items():
            assert live[name].shape == p.shape
            live[name].copy_(p)
    return theirs.train(), live


def check_peft(first=0):
    """40 layers of random shape, rank, alpha, bias and leading dimensions; the number of a case is its seed."""
    for case in range(first, first + 40):
        g = torch.Generator().manual_seed(case)
        torch.manual_seed(case)
        draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: B023, E731
        size_in, size_out = draw(1, 40), draw(1, 40)
        rank, alpha = draw(1, min(size_in, size_out, 12)), draw(1, 400) / 10
        lead = [(), (draw(1, 30),), (draw(1, 5), draw(1, 7)), (2, draw(1, 3), 2)][draw(0, 3)]
        flavor, bias = ("peft", "lycoris")[draw(0, 1)], bool(draw(0, 1))
        layer, m = built(size_in, size_out, rank=rank, alpha=alpha, flavor=flavor, bias=bias)
        theirs, live = stock(layer, alpha=alpha)
        x = rand(*lead, size_in)
        with double():
            compare(layer(x), theirs(x), factors(m) | {"x": x}, live | {"x": x}, f"{case}: {size_in} -> {size_out}, {rank=}, {alpha=}")


@pytest.fixture(params=["low_rank", "materialised"])
def route(request, monkeypatch):
    """One of the two ways to compute the update, whatever the size."""
    monkeypatch.setattr(khatri_rao, "materialises", lambda *a: request.param == "materialised")


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_equals_peft_on_random_layers(first, route):
    check_peft(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_plain_pytorch(dtype, route):
    """Output and gradients against the formula in fp64, beside the formula in the layer's dtype."""
    torch.manual_seed(4)
    layer, m = built(24, 20, rank=4, dtype=dtype)
    own = factors(m)
    assert {p.dtype for p in own.values()} == {torch.float32}
    x, d = torch.randn(64, 24, dtype=dtype), torch.randn(64, 20, dtype=dtype)
    seen = []
    for kind in ("ours", "exact", "plain"):
        leaf = (x.double() if kind == "exact" else x).requires_grad_()
        to = leaf.dtype
        formula = lambda: papers.loha(leaf, layer.weight.to(to), layer.bias.to(to), *(p.to(to) for p in own.values()), ALPHA / 4)  # noqa: B023, E731
        y = layer(leaf) if kind == "ours" else formula()
        seen.append({"y": y} | dict(zip(("x", *own), torch.autograd.grad(y, (leaf, *own.values()), d.to(to)), strict=True)))
    for name, got in seen[0].items():
        assert_as_good(got, seen[1][name].double(), seen[2][name], name)


# ---- scale, start, size


SCALES = [
    (dict(), 8 / 8),
    (dict(rank=4, alpha=6), 1.5),
    (dict(rank=4, alpha=0), 0.0),
    (dict(flavor="lycoris", rank=4, alpha=1), 0.25),
    (dict(flavor="lycoris", rank=4, alpha=None), 1.0),
    (dict(flavor="lycoris", rank=4, alpha=6, rslora=True), 3.0),
    (dict(flavor="lycoris", rank=4, alpha=None, rslora=True), 2.0),
]


@pytest.mark.parametrize(("options", "scale"), SCALES, ids=str)
def test_scale(options, scale):
    layer = fastpeft.AdaptedLinear(IN, OUT, method="loha", dtype=DT, **options)
    m = moved(layer).adapter.loha
    assert m.scale == scale
    x = rand(4, IN)
    assert_fp64(layer(x), papers.loha(x, layer.weight, layer.bias, *factors(m).values(), scale))


def check_start(flavor="peft"):
    """Moments of the factors at a size where one in a million draws would miss these six standard errors."""
    torch.manual_seed(5)
    m = fastpeft.AdaptedLinear(300, 400, method="loha", rank=16, flavor=flavor, dtype=DT).adapter.loha
    bound = dict(w1_a=1 / 4, w1_b=300**-0.5, w2_a=1 / 4, w2_b=0.0)
    std = {n: b / math.sqrt(3) for n, b in bound.items()} if flavor == "peft" else dict(w1_a=0.1, w1_b=1.0, w2_a=0.0, w2_b=1.0)
    for name, p in factors(m).items():
        n = p.numel()
        assert abs(p.mean()) <= 6 * std[name] / math.sqrt(n), f"mean of {name}: {p.mean()}"
        assert abs(p.std() - std[name]) <= 6 * std[name] / math.sqrt(2 * n), f"std of {name}: {p.std()}, want {std[name]}"
        if flavor == "peft":
            assert 0.99 * bound[name] <= p.abs().max() <= bound[name], f"bound of {name}: {p.abs().max()}"
        elif std[name]:
            # a normal law: its fourth moment is three times the variance squared, a uniform one's 1.8 times
            assert abs((p / std[name]).pow(4).mean() - 3) <= 6 * math.sqrt(96 / n), f"{name} is not normal"


@pytest.mark.parametrize("flavor", ["peft", "lycoris"])
def test_starts_as_published(flavor):
    check_start(flavor)


@pytest.mark.parametrize("flavor", ["peft", "lycoris"])
def test_starts_at_the_base_and_leaves_it(flavor):
    """The zero factor alone has a gradient at first, the others from the second step on."""
    layer = fastpeft.AdaptedLinear(IN, OUT, method="loha", rank=3, flavor=flavor, dtype=DT)
    x, zero = rand(6, IN), "w2_b" if flavor == "peft" else "w2_a"
    assert_fp64(layer(x), papers.linear(x, layer.weight, layer.bias))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for step in range(2):
        layer(x).square().sum().backward()
        for name, p in factors(layer.adapter.loha).items():
            assert bool(p.grad.any()) == (step == 1 or name == zero), (step, name)
        optimizer.step()
        optimizer.zero_grad()
    assert (layer(x) - papers.linear(x, layer.weight, layer.bias)).abs().max() > 1e-3


def test_size_and_rank_of_the_update():
    layer, m = built(40, 30, rank=4)
    assert sum(p.numel() for p in m.parameters()) == 2 * 4 * (40 + 30)
    (term,) = m.terms(Plain(layer.weight))
    assert term.A.rows().shape == (16, 40) and term.B.columns().shape == (30, 16)
    assert torch.linalg.matrix_rank(delta_weight(term, DT)) == 16


@pytest.mark.parametrize(("rank", "materialised"), [(1, False), (4, True)])
def test_keeps_x_alone(rank, materialised):
    """Below and above the rank from which the update is formed as a whole."""
    tokens, size_in, size_out = 512, 32, 48
    assert khatri_rao.materialises(size_out, size_in, rank, True) == materialised
    layer = fastpeft.AdaptedLinear(size_in, size_out, method="loha", rank=rank)
    x = torch.randn(tokens, size_in, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == 4 * tokens * size_in


# ---- dropout of rows and of the module


def check_row_dropout(p=0.4, flavor="peft", **options):
    """The layer under one seed against the formula with those rows dropped and, in PEFT's flavour, against PEFT itself."""
    torch.manual_seed(6)
    layer, m = built(rank=2, rank_dropout=p, flavor=flavor, **options)
    x = rand(4, IN)
    torch.manual_seed(7)
    torch.rand(1)  # what decides on the whole module
    kept = (torch.rand(OUT) > p).to(DT)
    assert 0 < kept.sum() < OUT
    share = kept.mean() if flavor == "peft" or options else 1.0
    delta = ALPHA / 2 * (m.w1_a @ m.w1_b) * (m.w2_a @ m.w2_b)
    want = papers.linear(x, layer.weight + delta * (kept / share)[:, None], layer.bias)
    own = factors(m) | {"x": x}
    torch.manual_seed(7)
    compare(layer(x), want, own, own, "formula")
    if flavor == "peft":
        theirs, live = stock(layer, alpha=ALPHA, rank_dropout=p)
        torch.manual_seed(7)
        y = layer(x)
        torch.manual_seed(7)
        compare(y, theirs(x), own, live | {"x": x}, "PEFT")


@pytest.mark.parametrize("flavor", ["peft", "lycoris"])
@pytest.mark.parametrize("p", [0.3, 0.4, 0.8])
def test_rank_dropout_drops_rows_of_the_update(p, flavor):
    check_row_dropout(p, flavor)


def test_lycoris_rescales_kept_rows_when_asked():
    check_row_dropout(0.4, "lycoris", rank_dropout_scale=True)
    with pytest.raises(ValueError, match="always rescales"):
        built(rank=2, rank_dropout_scale=True)


def test_no_row_kept_is_no_update():
    """PEFT divides by the share kept, here zero."""
    layer, m = built(4, 2, rank=1, rank_dropout=0.9)
    x = rand(3, 4)
    base, none = papers.linear(x, layer.weight, layer.bias), 0
    for seed in range(20):
        torch.manual_seed(seed)
        torch.rand(1)
        if (torch.rand(2) > 0.9).any():
            continue
        none += 1
        torch.manual_seed(seed)
        y = layer(x)
        assert_fp64(y, base)
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), list(factors(m).values())))
    assert none > 5


@pytest.mark.parametrize("flavor", ["peft", "lycoris"])
def test_module_dropout_drops_all_or_nothing(flavor):
    layer, _ = built(rank=2, module_dropout=0.3, flavor=flavor)
    x = rand(4, IN)
    base, full, dropped = papers.linear(x, layer.weight, layer.bias), layer.eval()(x), 0
    layer.train()
    for seed in range(400):
        torch.manual_seed(seed)
        y = layer(x)
        torch.manual_seed(seed)
        expected = base if torch.rand(1) < 0.3 else full
        assert_fp64(y, expected)
        dropped += expected is base
    assert abs(dropped / 400 - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 400)


DROPS = dict(rank_dropout=0.4, module_dropout=0.2)


def test_dropout_acts_in_training_only_and_not_in_merge():
    model, x = MLP(), rand(5, 16)
    fastpeft.adapt(model, "loha", rank=3, **DROPS)
    perturb(model)
    want = model.eval()(x)
    assert torch.equal(model(x), want)
    model.train()
    assert any(not torch.equal(model(x), want) for _ in range(9))
    model.eval()
    assert_fp64(fastpeft.merge(model)(x), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_rows(reentrant):
    model, x, seen = MLP(), rand(5, 16), []
    fastpeft.adapt(model, "loha", rank=3, **DROPS)
    perturb(model).train()
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        seen.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        x.grad = None
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_compiled_steps_draw_new_rows():
    model, x = MLP(), rand(5, 16)
    fastpeft.adapt(model, "loha", rank=3, rank_dropout=0.5)
    compiled = torch.compile(perturb(model).train(), backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))
    with torch.no_grad():
        assert_fp64(compiled.eval()(x), model(x))


# ---- planted faults


def rows_in_the_other_order(monkeypatch):
    real = khatri_rao._composed
    monkeypatch.setattr(khatri_rao, "_composed", lambda t: (real((t[1], t[0], *t[2:]))[0], real(t)[1]))


def columns_in_the_other_order(monkeypatch):
    real = khatri_rao._composed
    monkeypatch.setattr(khatri_rao, "_composed", lambda t: (real(t)[0], real((t[0], t[1], t[3], t[2]))[1]))


def second_factor_ignored(monkeypatch):
    real = khatri_rao._composed
    monkeypatch.setattr(khatri_rao, "_composed", lambda t: (real(t)[0], real((t[0], t[1], t[2], t[2]))[1]))


def never_materialised(check):
    """The check with the low-rank route only, which the faults above are in."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(khatri_rao, "materialises", lambda *a: False)
            check()

    run.__name__ = check.__name__
    return run


def scale_missing(monkeypatch):
    monkeypatch.setattr(loha, "scaling", lambda rank, alpha, rslora: 1.0)


def scale_of_the_composed_rank(monkeypatch):
    monkeypatch.setattr(loha, "scaling", lambda rank, alpha, rslora: alpha / rank**2)


def kept_rows_not_rescaled(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "clamp_min", lambda self, low: torch.ones_like(self))


def dropped_rows_kept(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "ge", lambda self, p: torch.ones_like(self))


def uniform_start_for_all(monkeypatch):
    real = nn.init.kaiming_uniform_
    monkeypatch.setattr(nn.init, "normal_", lambda p, std=1.0: real(p, a=math.sqrt(5)))


def start_by_the_other_side(monkeypatch):
    real = nn.init.kaiming_uniform_
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda p, a: real(p, a=a, mode="fan_out"))


FAULTS = [
    (rows_in_the_other_order, never_materialised(check_paper)),
    (rows_in_the_other_order, never_materialised(check_peft)),
    (columns_in_the_other_order, never_materialised(check_paper)),
    (second_factor_ignored, never_materialised(check_paper)),
    (scale_missing, check_paper),
    (scale_missing, check_peft),
    (scale_of_the_composed_rank, check_paper),
    (kept_rows_not_rescaled, check_row_dropout),
    (dropped_rows_kept, check_row_dropout),
    (uniform_start_for_all, lambda: check_start("lycoris")),
    (start_by_the_other_side, check_start),
]


@pytest.mark.parametrize(("plant", "check"), FAULTS, ids=lambda f: f.__name__)
def test_planted_fault_is_found(plant, check, monkeypatch):
    with monkeypatch.context() as planted:
        plant(planted)
        with pytest.raises(AssertionError):
            check()
    check()


# ---- folders


def through_peft(make, folder):
    """Stock PEFT over a fresh model; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OWN_NOTICE, FutureWarning)
        return peft.PeftModel.from_pretrained(make(), folder)


# name -> (our settings, PEFT's)
IO = {
    "plain": ({}, {}),
    "lycoris": ({"flavor": "lycoris"}, {}),
    "dropouts": (DROPS, DROPS),
    "head": ({"modules_to_save": ["classifier"]}, {"modules_to_save": ["classifier"]}),
    "seq_cls": ({"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}),
    "patterns": (
        {"rank_pattern": {"1.attention.self.query": 3}, "alpha_pattern": {"value": 9}},
        {"rank_pattern": {"1.attention.self.query": 3}, "alpha_pattern": {"value": 9}},
    ),
    "regex": ({"target_modules": r".*\.1\..*\.(query|key)"}, {"target_modules": r".*\.1\..*\.(query|key)"}),
    "exclude": ({"exclude_modules": r".*\.0\..*"}, {"exclude_modules": r".*\.0\..*"}),
    "all_linear": (
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]}, {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    ),
}  # fmt: skip
TARGETS = ["query", "value"]


def ours(**settings):
    model = bert()
    fastpeft.adapt(model, "loha", **({"rank": 4, "alpha": 6, "target_modules": TARGETS} | settings))
    return shaken(model)


@pytest.mark.parametrize("case", IO)
def test_our_folder_loads_in_peft_without_a_warning(case, tmp_path):
    model = ours(**IO[case][0])
    want = logits(model)
    assert (want - logits(bert())).abs().max() > 1e-2
    fastpeft.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(through_peft(bert, tmp_path)), want, rtol=1e-5, atol=1e-5)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["peft_type"] == "LOHA" and not written.keys() - peft.LoHaConfig().to_dict().keys()


@pytest.mark.parametrize("case", IO)
def test_our_folder_loads_here(case, tmp_path):
    model, fresh = ours(**IO[case][0]), bert()
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    mine, loaded = (next(m for m in net.modules() if isinstance(m, loha.LoHa)) for net in (model, fresh))
    assert (loaded.rescales, loaded.scale, loaded.drop) == (mine.rescales, mine.scale, mine.drop)
    fastpeft.load_adapter(model, tmp_path)


@pytest.mark.parametrize("case", IO)
def test_their_folder_loads_here(case, tmp_path):
    config = peft.LoHaConfig(**({"r": 4, "alpha": 6, "target_modules": TARGETS} | IO[case][1]))
    other = shaken(peft.get_peft_model(bert(), config))
    want = logits(other)
    other.save_pretrained(tmp_path)
    model = bert()
    fastpeft.load_adapter(model, tmp_path)
    assert (want - logits(bert())).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", IO)
def test_adapt_takes_a_peft_config(case):
    settings = {"r": 4, "alpha": 6, "target_modules": TARGETS} | IO[case][1]
    model, other = bert(), peft.get_peft_model(bert(), peft.LoHaConfig(**settings))
    report = fastpeft.adapt(model, peft.LoHaConfig(**settings))
    found = [n.removeprefix("base_model.model.") for n, m in other.named_modules() if hasattr(m, "hada_w1_a")]
    assert sorted(report.adapted) == sorted(found)
    for name in found:
        mine, theirs = model.get_submodule(name).adapter.loha, other.get_submodule(f"base_model.model.{name}")
        assert mine.scale == theirs.scaling["default"]
        assert mine.drop == [theirs.module_dropout["default"], theirs.rank_dropout["default"]]
        assert all(getattr(theirs, f"hada_{n}")["default"].shape == p.shape for n, p in factors(mine).items())


@pytest.mark.parametrize(
    "field",
    [{"use_effective_conv2d": True}, {"layers_to_transform": [0]}, {"layers_pattern": "layer", "layers_to_transform": [0]}, {"init_weights": False}],
    ids=str,
)
def test_unsupported_fields_are_named(field):
    model = bert()
    with pytest.raises(ValueError, match=next(iter(field))):
        fastpeft.adapt(model, peft.LoHaConfig(target_modules=["query"], **field))
    assert not any("adapter" in n for n, _ in model.named_modules())


@pytest.mark.parametrize("field", [{"use_effective_conv2d": True}, {"bias": "all"}, {"fan_in_fan_out": True}, {"use_dora": True}, {"new": 3}], ids=str)
def test_a_folder_with_such_a_field_is_refused(field, tmp_path):
    fastpeft.save_adapter(ours(), tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    fastpeft.load_adapter(bert(), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | field))
    with pytest.raises(CheckpointError, match=f"not supported: .*{next(iter(field))}"):
        fastpeft.load_adapter(bert(), tmp_path)


def test_random_start_of_peft_is_only_refused_as_a_start(tmp_path):
    """In a folder the values are there, whatever they started from."""
    other = shaken(peft.get_peft_model(bert(), peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False)))
    other.save_pretrained(tmp_path)
    model = bert()
    fastpeft.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)


OWN = {
    "rslora": (bert, {"flavor": "lycoris", "rslora": True}),
    "alpha is the rank": (bert, {"flavor": "lycoris", "alpha": None, "rank_pattern": {"value": 2}}),
    "bias": (bert, {"bias": "all"}),
    "bias of adapted layers": (bert, {"bias": "lora_only"}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn"]}),
}


@pytest.mark.parametrize("case", OWN)
def test_what_peft_cannot_hold_is_our_own_folder(case, tmp_path):
    """It comes back here; stock PEFT refuses it by its peft_type and does not misread it."""
    make, settings = OWN[case]
    model, fresh = make(), make()
    fastpeft.adapt(model, "loha", **({"rank": 4, "alpha": 6, "target_modules": TARGETS} | settings))
    fastpeft.save_adapter(shaken(model), tmp_path)
    fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model)) and not torch.equal(logits(fresh), logits(make()))
    fastpeft.load_adapter(model, tmp_path)
    with pytest.raises((ValueError, KeyError), match="FASTPEFT"):
        peft.PeftModel.from_pretrained(make(), tmp_path)


def test_dropouts_need_not_agree_to_load_but_the_scale_must(tmp_path):
    fastpeft.save_adapter(ours(**DROPS), tmp_path)
    fastpeft.load_adapter(ours(), tmp_path)
    for other in ({"alpha": 5}, {"rank": 3}, {"flavor": "lycoris"}):
        with pytest.raises(CheckpointError, match=next(iter(other))):
            fastpeft.load_adapter(ours(**other), tmp_path)
    lora = bert()
    fastpeft.adapt(lora, "lora", rank=4, alpha=6, target_modules=TARGETS)
    with pytest.raises(CheckpointError, match=r"loha.*adapted with \['lora'\]"):
        fastpeft.load_adapter(lora, tmp_path)


KEY = "base_model.model.bert.encoder.layer.0.attention.self.query.hada_w1_a"
DAMAGE = [
    (lambda t: t.pop(KEY), "1 missing.*hada_w1_a"),
    (lambda t: t.update({KEY.replace("w1_a", "t1"): torch.ones(4, 4)}), "unexpected.*hada_t1"),
    (lambda t: t.update({KEY: t[KEY].t().contiguous()}), "shape"),
    (lambda t: t.update({KEY: t[KEY].half()}), "several dtypes"),
    (lambda t: t.update({KEY: t[KEY] * float("nan")}), "NaN"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[w for _, w in DAMAGE])
def test_damaged_folder_changes_nothing(damage, words, tmp_path):
    fastpeft.save_adapter(ours(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    model = bert()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        fastpeft.load_adapter(model, tmp_path)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize(("rank", "exported"), [(3, {9}), (4, {16}), (7, {16})], ids=str)
def test_export_is_a_lora_of_rank_squared_or_the_layers_own(rank, exported, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model, fresh = copy.deepcopy(plain), copy.deepcopy(plain)
    fastpeft.adapt(model, "loha", rank=rank, alpha=5)
    want = perturb(model).eval()(x)
    fastpeft.export_lora(model, tmp_path)
    ranks = {t.shape[0] for k, t in load_file(tmp_path / WEIGHTS).items() if "lora_A" in k}
    assert ranks == exported == {json.loads((tmp_path / CONFIG).read_text())["r"]}
    assert_fp64(peft_logits(plain, tmp_path, x), want)
    fastpeft.load_adapter(fresh, tmp_path)
    assert_fp64(fresh.eval()(x), want)


# ---- the comparison with PEFT on the command line, and bad input


def test_bench_gives_peft_the_same_values():
    found = layers(Shape(8, 24, 20, DT), "loha", {"rank": 3, "alpha": 6})
    mine, theirs = found[FASTPEFT].linear.adapter.loha, found[PEFT].base_model.model.linear
    for name, p in factors(mine).items():
        assert torch.equal(getattr(theirs, f"hada_{name}")["default"], p), name
    x = rand(8, 24)
    with torch.no_grad():
        theirs.hada_w2_b["default"].copy_(mine.w2_b.normal_())
    assert_fp64(found[FASTPEFT](x), found[PEFT](x))
    scales = itertools.product(({}, {"alpha": 3}), ({"rslora": True}, {"alpha": None}))
    assert peft_counterpart("loha") and not any(peft_counterpart("loha", {"flavor": "lycoris"} | a | b) for a, b in scales)


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(rank=0), ValueError, r"loha: rank=0 at 'up'.*1 to 16"),
        (dict(rank=17), ValueError, r"loha: rank=17 at 'up'.*rank_pattern"),
        (dict(rank=2.0), TypeError, r"rank=2.0"),
        (dict(alpha=NAN), ValueError, r"loha: alpha=nan.*finite"),
        (dict(alpha=None), ValueError, r"loha: .*alpha=None with flavor='peft'"),
        (dict(rslora=True), ValueError, r"loha: rslora=True.*flavor='peft'"),
        (dict(flavor="lycoris", alpha=0), ValueError, r"loha: alpha=0 with flavor='lycoris'.*alpha=None"),
        (dict(flavor="kohya"), ValueError, r"loha: flavor='kohya'.*'peft' or 'lycoris'"),
        (dict(rank_dropout=1.0), ValueError, r"loha: rank_dropout=1.0"),
        (dict(module_dropout=-0.1), ValueError, r"loha: module_dropout=-0.1"),
        (dict(dropout=0.1), ValueError, r"'dropout' does not exist for loha.*rank_dropout"),
        (dict(use_scalar=True), ValueError, r"'use_scalar' does not exist"),
    ],
    ids=str,
)
def test_errors(options, error, words):
    model = MLP()
    with pytest.raises(error, match=words):
        fastpeft.adapt(model, "loha", **options)
    assert type(model.up) is nn.Linear
