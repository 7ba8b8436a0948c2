"""LoHa and LoKr against LyCORIS' own modules: weights, outputs, gradients, shapes, splits, starts, dropout of rows; faults."""

from __future__ import annotations

import collections
import functools
import itertools
import math

import pytest
import torch
from checks import DT, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.method import loha, lokr
from fastpeft.terms import effective_weight

pytest.importorskip("lycoris")
pytest.importorskip("peft")
import lycoris.functional.general as general
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft_layers import moved
from test_loha import compare, double

MODULES = {"loha": (LohaModule, "hada_"), "lokr": (LokrModule, "lokr_")}
THEIRS = {"rank": "lora_dim", "rslora": "rs_lora", "unbalanced": "unbalanced_factorization"}


def layer_of(kind, size_in, size_out, bias=True, **options):
    return fastpeft.AdaptedLinear(size_in, size_out, bias, method=kind, flavor="lycoris", dtype=DT, **options)


def factors(layer, kind):
    return dict(layer.adapter.get_submodule(kind).named_parameters())


def stock(layer, kind, bypass=False, **options):
    """LyCORIS' module over the layer's weight and bias, in training mode, at its own start; its factors under our names."""
    base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=DT)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    cls, stem = MODULES[kind]
    with double():
        module = cls("layer", base, bypass_mode=bypass, **{THEIRS.get(k, k): v for k, v in options.items()})
    if kind == "lokr" and module.use_w1 and module.use_w2:
        module.scale = 1.0  # sqrt(rank) with rs_lora: see test_scale_of_two_whole_halves
    return module.train(), {name.removeprefix(stem): p for name, p in module.named_parameters()}


def pair(kind, size_in, size_out, bias=True, bypass=False, **options):
    """(layer, its factors, LyCORIS' module, its factors) with equal values away from the start."""
    layer = moved(layer_of(kind, size_in, size_out, bias, **options))
    module, live = stock(layer, kind, bypass, **options)
    own = factors(layer, kind)
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in live.items()}, options
    with torch.no_grad():
        for name, p in own.items():
            live[name].copy_(p)
    return layer, own, module, live


def random_case(kind, case):
    """Sizes, bias and options; the number of a case is its seed."""
    g = torch.Generator().manual_seed(case)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: E731
    if kind == "loha":
        size_in, size_out = draw(1, 40), draw(1, 40)
        options = {"rank": draw(1, min(size_in, size_out, 12))}
    else:
        # products, so that there is something to split; a prime now and then
        size_in, size_out = draw(1, 9) * draw(1, 8), draw(1, 9) * draw(1, 8)
        options = {
            "rank": draw(1, min(size_in, size_out, 4)),
            "factor": (-1, draw(1, 12), draw(1, 40))[draw(0, 2)],
            "decompose_both": bool(draw(0, 1)),
            "full_matrix": draw(0, 5) == 0,
            "unbalanced": bool(draw(0, 1)),
        }
    alpha = (draw(1, 400) / 10, None)[draw(0, 4) == 0]
    return size_in, size_out, bool(draw(0, 1)), options | {"alpha": alpha, "rslora": bool(draw(0, 1))}, draw


def check_random(kind, first=0):
    """40 layers: the effective weight, the output and every gradient."""
    for case in range(first, first + 40):
        size_in, size_out, bias, options, draw = random_case(kind, case)
        lead = [(), (draw(1, 30),), (draw(1, 5), draw(1, 7)), (2, draw(1, 3), 2)][draw(0, 3)]
        torch.manual_seed(case)
        layer, own, module, live = pair(kind, size_in, size_out, bias, bypass=bool(draw(0, 1)), **options)
        words, x = f"{case}: {size_in} -> {size_out}, {options}", rand(*lead, size_in)
        terms = layer.adapter.get_submodule(kind).terms(Plain(layer.weight))
        assert_fp64(
            effective_weight(layer.weight, terms, DT), layer.weight + module.get_weight(module.shape), words
        )
        compare(layer(x), module(x), own | {"x": x}, live | {"x": x}, words)


@pytest.mark.parametrize("first", range(0, 240, 40))
@pytest.mark.parametrize("kind", MODULES)
def test_equals_lycoris_on_random_layers(kind, first):
    check_random(kind, first)


def test_the_random_layers_reach_every_form_of_lokr():
    """Each half whole or low-rank, and exact divisors on either side of the root, many times over."""
    forms, divisors = collections.Counter(), collections.Counter()
    for case in range(240):
        size_in, size_out, _, options, _ = random_case("lokr", case)
        module, live = stock(layer_of("lokr", size_in, size_out, **options), "lokr", **options)
        forms[module.use_w1, module.use_w2, options["rslora"]] += 1
        divisors.update(options["factor"] ** 2 > n for n in (size_in, size_out) if n % options["factor"] == 0)
        assert len(live) == 4 - module.use_w1 - module.use_w2
    assert all(
        forms[form] >= 4 for form in itertools.product((True, False), repeat=3) if form[:2] != (False, True)
    ), forms
    assert all(divisors[beyond] >= 20 for beyond in (True, False)), divisors


# ---- splits, starts, scale


def check_splits():
    for n, factor in itertools.product(range(1, 600), [-1, *range(1, 40)]):
        assert lokr.factorization(n, factor, "lycoris") == general.factorization(n, factor), (n, factor)


def test_splits_equal_lycoris():
    check_splits()


def test_the_flavours_split_alike_but_for_exact_divisors_beyond_the_root():
    for n, factor in itertools.product(range(1, 600), [-1, *range(1, 40)]):
        a, b = (lokr.factorization(n, factor, flavor) for flavor in ("peft", "lycoris"))
        turned = n % factor == 0 and factor**2 > n > 0 and factor > 0
        assert a == (b[::-1] if turned else b), (n, factor)


STARTS = {
    "loha": ("loha", {}),
    "w2 low-rank": ("lokr", {}),
    "both low-rank": ("lokr", {"decompose_both": True}),
    "both whole": ("lokr", {"full_matrix": True}),
}


def check_start(case="both low-rank"):
    """Same factors zero; of the others the moments agree within six standard errors of their difference."""
    kind, options = STARTS[case]
    torch.manual_seed(5)
    layer = layer_of(kind, 4096, 3600, rank=16, **options)
    own, (_, live) = factors(layer, kind), stock(layer, kind, rank=16, **options)
    assert own.keys() == live.keys()
    for name, p in own.items():
        q, n = live[name], p.numel()
        assert p.shape == q.shape and bool(p.any()) == bool(q.any()), name
        if p.any():
            std = q.std()
            assert abs(p.mean() - q.mean()) <= 6 * std * math.sqrt(2 / n), f"mean of {name}"
            assert abs(p.std() - std) <= 6 * std / math.sqrt(n), f"std of {name}: {p.std()}, {std}"
            # the fourth moment tells a normal law (3, variance 96) from a uniform one (1.8, less variance)
            assert abs((p / p.std()).pow(4).mean() - (q / std).pow(4).mean()) <= 6 * math.sqrt(192 / n), (
                f"law of {name}"
            )


@pytest.mark.parametrize("case", STARTS)
def test_starts_as_lycoris(case):
    check_start(case)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 3}, {"alpha": None}, {"rslora": True, "alpha": 5}], ids=str
)
@pytest.mark.parametrize("case", STARTS)
def test_lycoris_stores_our_scale(case, options):
    """alpha / rank of what LyCORIS writes is the scale here, with rs_lora too; a file's reader relies on it."""
    kind, more = STARTS[case]
    layer = layer_of(kind, 24, 36, **({"rank": 2, "alpha": 1} | options | more))
    module, _ = stock(layer, kind, **({"rank": 2, "alpha": 1} | options | more))
    (term,) = layer.adapter.get_submodule(kind).terms(Plain(layer.weight))
    stored = module.alpha / 2 if case != "both whole" else torch.ones((), dtype=DT)
    assert_fp64(torch.tensor(term.scale, dtype=DT), stored)
    assert_fp64(torch.tensor(module.scale, dtype=DT), stored)


@torch.no_grad()
def test_scale_of_two_whole_halves():
    """1, as LyCORIS says and its reader does; its module itself takes sqrt(rank) under rs_lora, and stores rank^1.5 as alpha."""
    base = nn.Linear(24, 36)
    for rslora, scale in ((False, 1.0), (True, 3.0)):
        module = LokrModule("layer", base, lora_dim=9, alpha=2, full_matrix=True, rs_lora=rslora)
        assert module.scale == scale and module.alpha == 9 * scale
        values = [module.lokr_w1, None, None, module.lokr_w2, None, None, None, None, module.alpha, None]
        assert LokrModule.make_module_from_state_dict("layer", base, *values).scale == 1.0
        assert (
            layer_of("lokr", 24, 36, rank=9, alpha=2, full_matrix=True, rslora=rslora).adapter.lokr.scale
            == 1.0
        )


# ---- dropout of rows


DROPS = [
    ("loha", {}),
    ("lokr", {}),
    ("lokr", {"rank_dropout_scale": True}),
    ("lokr", {"rank_dropout_scale": True, "decompose_both": True}),
]


def check_row_dropout(kind="lokr", options=None):
    """Under one seed the same rows of the update are dropped, at training time only."""
    torch.manual_seed(6)
    options = {"rank": 2, "alpha": 3, "rank_dropout": 0.4} | (options or {})
    layer, own, module, live = pair(kind, 24, 20, **options)
    if kind == "loha":
        module.module_dropout = 1e-12  # draws what decides on the whole module, as ours does
    x = rand(5, 24)
    full = module.eval()(x)
    assert_fp64(layer.eval()(x), full)
    torch.manual_seed(7)
    y = layer.train()(x)
    torch.manual_seed(7)
    z = module.train()(x)
    assert (z - full).abs().max() > 1e-3
    compare(y, z, own | {"x": x}, live | {"x": x})


@pytest.mark.parametrize(("kind", "options"), DROPS, ids=str)
def test_rank_dropout_drops_the_rows_that_lycoris_drops(kind, options):
    check_row_dropout(kind, options)


# ---- planted faults


def no_scale(monkeypatch):
    for file in (loha, lokr):
        monkeypatch.setattr(file, "scaling", lambda rank, alpha, rslora: 1.0)


def divisors_in_peft_order(monkeypatch):
    real = lokr.factorization
    monkeypatch.setattr(lokr, "factorization", lambda n, factor, flavor: real(n, factor, "peft"))


def all_rows_kept(monkeypatch):
    for compare_with in ("ge", "gt"):
        monkeypatch.setattr(torch.Tensor, compare_with, lambda self, p: torch.ones_like(self))


def after_the_start(monkeypatch, cls, change):
    """`change` acts on what cls.__init__ left."""
    real = cls.__init__

    @functools.wraps(real)
    def planted(self, *args, **options):
        real(self, *args, **options)
        with torch.no_grad():
            change(self)

    monkeypatch.setattr(cls, "__init__", planted)


def start_twice_as_wide(monkeypatch):
    after_the_start(monkeypatch, loha.LoHa, lambda m: m.w1_a.mul_(2))


def uniform_start(monkeypatch):
    after_the_start(monkeypatch, loha.LoHa, lambda m: m.w2_b.uniform_(-math.sqrt(3), math.sqrt(3)))


def other_factor_zero(monkeypatch):
    after_the_start(monkeypatch, lokr.LoKr, lambda m: m.w2_a.zero_())


FAULTS = [
    (no_scale, lambda: check_random("loha")),
    (no_scale, lambda: check_random("lokr")),
    (divisors_in_peft_order, lambda: check_random("lokr")),
    (divisors_in_peft_order, check_splits),
    (all_rows_kept, lambda: check_row_dropout("loha")),
    (all_rows_kept, lambda: check_row_dropout("lokr")),
    (start_twice_as_wide, lambda: check_start("loha")),
    (uniform_start, lambda: check_start("loha")),
    (other_factor_zero, lambda: check_start("w2 low-rank")),
]


@pytest.mark.parametrize(("plant", "check"), FAULTS)
def test_planted_fault_is_found(plant, check, monkeypatch):
    with monkeypatch.context() as planted:
        plant(planted)
        with pytest.raises(AssertionError):
            check()
    check()
