"""What users get wrong: each mistake has an error that names it, and leaves the model as it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checks import DT, MLP, perturb, rand
from torch import nn

import fastpeft
from fastpeft import AdaptedLinear, adapted_linear
from fastpeft.terms import Bias, Gain, LowRank

NAN = float("nan")

ADAPT = [
    (dict(method="olora"), ValueError, "olora.*2406.01775.*o_lora.*2310.14152"),
    (dict(method="lorra"), ValueError, "'lorra' does not exist.*lora"),
    (dict(method=[]), ValueError, "one name"),
    (dict(method=["lora", "lora"]), ValueError, "different names"),
    (dict(method=["lora", "nope"]), ValueError, "'nope' does not exist"),
    (dict(rnak=4), ValueError, "'rnak' does not exist.*rank"),
    (dict(grad="full"), ValueError, "'grad' does not exist for lora"),
    (dict(method="dora", grad="half"), ValueError, "grad='half'.*simple.*full"),
    (dict(target_modules=["nope"]), ValueError, "nope.*matches no layer.*up, down"),
    (dict(target_modules=[]), ValueError, "target_modules|no layer"),
    (dict(target_modules=r"(up"), ValueError, "regular expression"),
    (dict(target_modules=[3]), ValueError, "list of module names"),
    (dict(target_modules=["act"]), ValueError, "act.*no linear"),
    (dict(exclude_modules=["up", "down"]), ValueError, "no layer is left"),
    (dict(modules_to_save=["head"]), ValueError, "'head' matches no module"),
    (dict(bias="some"), ValueError, "bias='some'.*lora_only"),
    (dict(rank=0), ValueError, "rank=0 at 'up'"),
    (dict(rank=-3), ValueError, "rank=-3 at 'up'"),
    (dict(rank=2.0), TypeError, "rank=2.0"),
    (dict(rank=True), TypeError, "rank=True"),
    (dict(rank=17), ValueError, "rank=17 at 'up'.*1 to 16"),
    (dict(rank_pattern={"down": 40}), ValueError, "rank=40 at 'down'"),
    (dict(alpha=NAN), ValueError, "alpha=nan.*finite"),
    (dict(alpha=float("inf")), ValueError, "alpha=inf.*finite"),
    (dict(alpha_pattern={"down": NAN}), ValueError, "alpha=nan"),
    (dict(dropout=-0.1), ValueError, "dropout=-0.1"),
    (dict(dropout=1.0), ValueError, "dropout=1.0"),
    (dict(dropout=NAN), ValueError, "dropout=nan"),
    (dict(dropout="0.1"), ValueError, "dropout='0.1'"),
    (dict(method="melora", n=3), ValueError, "n=3.*divide"),
]


class Model(MLP):
    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()


@pytest.mark.parametrize(("call", "error", "message"), ADAPT, ids=[str(c[0]) for c in ADAPT])
def test_adapt_refuses_and_changes_nothing(call, error, message):
    model, x = Model(), rand(3, 16)
    model.down.bias.requires_grad_(False)
    before, want = copy.deepcopy(model.state_dict()), model(x)
    flags, keys = [p.requires_grad for p in model.parameters()], set(model.__dict__)
    with pytest.raises(error, match=message):
        fastpeft.adapt(model, **({"method": "lora"} | call))
    assert [type(m) for m in model.modules()] == [Model, nn.Linear, nn.Linear, nn.Tanh]
    assert [p.requires_grad for p in model.parameters()] == flags and set(model.__dict__) == keys
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(x), want)
    fastpeft.adapt(model, "lora", rank=2)


def test_second_adapt_and_unadapted_models():
    model, x = MLP(), rand(3, 16)
    for f in (fastpeft.unload, fastpeft.merge, lambda m: fastpeft.adapters_off(m).__enter__()):
        with pytest.raises(ValueError, match="MLP was not adapted"):
            f(model)
    fastpeft.adapt(model, "lora", rank=2)
    want = perturb(model)(x)
    with pytest.raises(ValueError, match="'up' is adapted already"):
        fastpeft.adapt(model, "dora", rank=2)
    assert torch.equal(model(x), want)
    fastpeft.merge(model)
    with pytest.raises(ValueError, match="was not adapted"):
        fastpeft.unload(model)


def test_merge_to_infinity_changes_nothing():
    model, x = MLP(), rand(3, 16)
    fastpeft.adapt(model, "lora", rank=2)
    perturb(model)
    with torch.no_grad():
        model.down.adapter.lora.B[0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'down' is not finite"):
        fastpeft.merge(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert isinstance(model.up, AdaptedLinear) and model(x).shape == (3, 16)


X, W, A, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
LOW = LowRank(A, B)
CALL = [
    (dict(x=torch.randn(5, 7)), ValueError, "in_features = 8"),
    (dict(x=torch.tensor(1.0)), ValueError, "last dimension"),
    (dict(x=X.double()), TypeError, "float64.*float32"),
    (dict(x=X.bfloat16()), TypeError, "bfloat16.*autocast"),
    (dict(x=X.to("meta")), ValueError, "meta.*cpu"),
    (dict(terms=[LowRank(B, A)]), ValueError, "swapped"),
    (dict(terms=[LowRank(A[:, :7], B)]), ValueError, r"\(2, 7\)"),
    (dict(terms=[LowRank(A, B, blocks=3)]), ValueError, "blocks=3 does not divide"),
    (dict(terms=[LowRank(A, B, dropout=1.0)]), ValueError, "dropout is 1.0"),
    (dict(terms=[LowRank(A, B, dropout=NAN)]), ValueError, "dropout is nan"),
    (dict(terms=[LowRank(A, B, rows=A)]), ValueError, "only a term with `mid`"),
    (dict(terms=[LOW, Gain(torch.ones(6)), Gain(torch.ones(6))]), ValueError, "two Gain"),
    (dict(terms=[Gain(torch.ones(5))]), ValueError, r"Gain.g is \(5,\)"),
    (dict(terms=[Gain(torch.ones(6), dropout=-0.1)]), ValueError, "Gain.dropout is -0.1"),
    (dict(terms=[Bias(torch.ones(6, 1))]), ValueError, r"Bias.b is \(6, 1\)"),
    (dict(terms=[LowRank(A, B, post=torch.tanh), Gain(torch.ones(6))]), ValueError, "post.*Gain"),
    (dict(terms=["lora"]), TypeError, "str is no term"),
    (dict(impl="cuda"), ValueError, "'cuda' does not exist.*torch, triton"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALL, ids=lambda c: None)
def test_adapted_linear_refuses(call, error, message):
    given = {"x": X, "terms": [LOW]} | call
    with pytest.raises(error, match=message):
        adapted_linear(given["x"], W, None, given["terms"], impl=given.get("impl"))


def test_wrong_environment_is_not_ignored(monkeypatch):
    monkeypatch.setenv("FASTPEFT_IMPL", "fast")
    with pytest.raises(ValueError, match="'fast' does not exist"):
        adapted_linear(X, W, None, [LOW])


def test_adapted_model_refuses_wrong_input():
    model = MLP(torch.float32)
    fastpeft.adapt(model, "lora", rank=2)
    for x, error in ((torch.randn(3, 15), ValueError), (torch.randn(3, 16).double(), TypeError), (torch.randn(3, 16, device="meta"), ValueError)):
        with pytest.raises(error):
            model(x)


def test_two_gains_at_one_layer(monkeypatch):
    from fastpeft import registry
    from fastpeft.method.dora import DoRA

    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    registry.recipe("dora_again", DoRA, paper="none")
    model = MLP()
    with pytest.raises(ValueError, match="two gains"):
        fastpeft.adapt(model, ["dora", "dora_again"], rank=2)
    assert type(model.up) is nn.Linear
    with pytest.raises(ValueError, match="already registered"):
        registry.recipe("lora", DoRA, paper="none")


@pytest.mark.parametrize("grad", ["simple", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_on_a_zero_row(grad, dropout):
    model, x = MLP(), rand(3, 16)
    with torch.no_grad():
        model.up.weight[4] = 0
    base = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastpeft.adapt(model, "dora", rank=2, grad=grad, dropout=dropout)
    about = [str(w.message) for w in caught if "norm zero" in str(w.message)]
    assert len(about) == 1 and "'up'" in about[0] and about[0].startswith("dora: 1 of 32 rows")
    torch.testing.assert_close(model.eval()(x), base)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        y = model(x)
        y.square().sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert model.up.adapter.dora.B[4].any(), "the zero row never moves"


def test_from_linear_takes_a_linear():
    with pytest.raises(TypeError, match="got Tanh"):
        AdaptedLinear.from_linear(nn.Tanh())
    assert DT is torch.float64
