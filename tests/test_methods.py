"""Properties of every method in the registry: a new file in fastpeft/method is tested by existing."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from checks import DT, MLP, perturb, rand, with_masks
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.adapter import base_of
from fastpeft.record import RECORD
from fastpeft.registry import get_recipe
from fastpeft.terms import Bias, delta_weight, effective_bias, effective_weight

METHODS = {m.name: m for m in fastpeft.methods()}
MERGEABLE = [n for n, m in METHODS.items() if m.mergeable]
DROPPING = [n for n, m in METHODS.items() if "dropout" in m.options]
every = pytest.mark.parametrize("name", list(METHODS))
mergeable = pytest.mark.parametrize("name", MERGEABLE)
ON_FFN = [n for n, m in METHODS.items() if m.site == "ffn"]
# what has a gradient from labels alone, which these tests do not give
LABELLED = {"moa": {"train_router": False}}
# options with which a method whose published start is no identity starts as one (at full rank LoftQ's factors make up for all)
IDENTITY = {"krona_b_res": {"res_init": 0.0}, "loftq": {"rank": 16}}


class Block(nn.Module):
    """An MLP as the FFN of a model, for the methods that sit beside one."""

    def __init__(self, **options):
        super().__init__()
        self.mlp = MLP(**options)

    up = property(lambda self: self.mlp.up)
    down = property(lambda self: self.mlp.down)

    def forward(self, x):
        return self.mlp(x)


def fresh(name, **options):
    """A model that the method fits on."""
    return Block(**options) if name in ON_FFN else MLP(**options)


def method_of(model, name):
    """The method at one site of a model that `fresh` made."""
    return (model.mlp if name in ON_FFN else model.up).adapter.get_submodule(name)


def small(name, **options):
    """The method's defaults, with the rank lowered to 3 where it has one (1 shared rank would hide a rotation), a density raised."""
    own = {k: v for k, v in {"rank": 3, "density": 0.1}.items() if k in METHODS[name].options}
    return own | LABELLED.get(name, {}) | options


def adapted(name, model=None, moved=True, **options):
    model = model or fresh(name)
    fastpeft.adapt(model, name, **small(name, **options))
    with_masks(model)
    return perturb(model) if moved else model


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def beside(model, name, x):
    """The Block's MLP plus the dense form of the method's terms, differentiable in its parameters."""
    method, mlp = method_of(model, name), model.mlp
    y = mlp.down(torch.tanh(mlp.up(x)))
    for t in method.terms(mlp.adapter.width):
        y = y + (t.b if isinstance(t, Bias) else nn.functional.linear(x, delta_weight(t, DT)))
    return y if method.residual() is None else y + method.residual() * x


def effective(model, x):
    """The MLP with each layer's single effective weight and bias, differentiable in the adapter's parameters."""

    def layer(m, x):
        base = base_of(m)
        terms = m.adapter.terms(base)
        W = m.weight if m.weight.requires_grad else base.dense(DT)
        return nn.functional.linear(x, effective_weight(W, terms, DT), effective_bias(m.bias, terms, DT))

    return layer(model.down, torch.tanh(layer(model.up, x)))


def grads(y, model, *more):
    own = trainable(model)
    assert own, "nothing trains"
    tensors = [*own.values(), *more]
    return dict(zip([*own, "x"], torch.autograd.grad(y.square().sum(), tensors), strict=False))


@every
def test_identity_at_init(name):
    model, x = fresh(name), rand(5, 16)
    want = model(x)
    assert_fp64(adapted(name, model, moved=False, **IDENTITY.get(name, {}))(x), want)


@every
def test_every_parameter_has_a_role_and_moves_the_output(name):
    model, x = adapted(name), rand(5, 16)
    model.eval()
    roles = method_of(model, name).ROLES
    for n, p in method_of(model, name).named_parameters():
        assert n.split(".")[0] in roles, f"{n} has no role"
        if p.requires_grad:
            before = model(x)
            with torch.no_grad():
                p.add_(0.1 * torch.randn_like(p))  # the same number everywhere would not move a softmax
            assert (model(x) - before).abs().max() > 1e-6, n


@mergeable
def test_forward_and_gradients_equal_effective_weight(name):
    model, x = adapted(name), rand(2, 5, 16)
    for mode in (model.train(), model.eval()):
        assert_fp64(mode(x), effective(mode, x), "y")
    got, want = grads(model(x), model, x), grads(effective(model, x), model, x)
    for n in want:
        assert_fp64(got[n], want[n], n)


@pytest.mark.parametrize("name", ON_FFN)
def test_forward_and_gradients_beside_an_ffn(name):
    model, x = adapted(name), rand(2, 5, 16)
    for mode in (model.train(), model.eval()):
        assert_fp64(mode(x), beside(mode, name, x), "y")
    got, want = grads(model(x), model, x), grads(beside(model, name, x), model, x)
    for n in want:
        assert_fp64(got[n], want[n], n)


@mergeable
@pytest.mark.parametrize("bias", [True, False])
def test_merge_equals_unmerged(name, bias):
    model, x = adapted(name, MLP(bias=bias)).eval(), rand(5, 16)
    want = model(x)
    classes = type(fastpeft.merge(model).up), type(model.down)
    assert classes == (nn.Linear, nn.Linear) and not any(".adapter." in n for n, _ in model.named_modules())
    assert_fp64(model(x), want)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in MERGEABLE])
def test_merge_refuses_what_has_no_weight(name):
    model, x = adapted(name).eval(), rand(5, 16)
    want = model(x)
    with pytest.raises(ValueError, match="non-linear FFN" if name in ON_FFN else "token-dependent"):
        fastpeft.merge(model)
    assert torch.equal(model(x), want)


@every
def test_unload_restores_bits_classes_and_flags(name):
    model = fresh(name)
    model.up.weight.requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    tensors = {n: id(p) for n, p in model.named_parameters()}
    adapted(name, model)
    fastpeft.unload(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert type(model.up) is type(model.down) is nn.Linear
    assert not any(m._forward_hooks or m._forward_pre_hooks or "adapter" in m._modules for m in model.modules())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@every
def test_frozen_tensors_get_no_grad(name):
    model = adapted(name)
    model(rand(5, 16)).square().sum().backward()
    own = model.__dict__[RECORD].trained
    for n, p in model.named_parameters():
        may = ".adapter." in n or n.startswith("adapter_shared.") or n in own
        assert (p.grad is not None) == p.requires_grad == (may and p.requires_grad), n


@every
def test_deepcopy_is_independent(name):
    model, x = adapted(name).eval(), rand(5, 16)
    want = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), want)
    perturb(twin)
    assert torch.equal(model(x), want) and not torch.equal(twin(x), want)


@every
def test_state_dict_round_trip(name):
    first, second = fresh(name), fresh(name)
    adapted(name, first), adapted(name, second)
    x = rand(5, 16)
    assert not torch.equal(first.eval()(x), second.eval()(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_acts_in_training_only(name):
    model, x = adapted(name, dropout=0.5), rand(5, 16)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    plain = adapted(name)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain.eval()(x))


@every
def test_two_micro_batches_and_a_reference_pass_between(name):
    """Gradients of two micro-batches add up to those of the whole; adapters_off between forward and backward is harmless."""
    model, x = fresh(name), rand(6, 16)
    base = model(x)
    adapted(name, model)
    want = grads(model(x), model)
    halves = [model(x[:2]), model(x[2:])]
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(model(x), base)
    for y in halves:
        y.square().sum().backward()
    for n, p in trainable(model).items():
        assert_fp64(p.grad, want[n], n)


@every
def test_fused_optimizer_step_reaches_the_output(name):
    """After fused steps the live model and a fresh one with the same state agree: no stale cache."""
    model, x = adapted(name), rand(5, 16)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05, fused=True)
    for _ in range(2):
        before = model.train()(x)
        before.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = adapted(name)
        fresh.load_state_dict(model.state_dict())
        assert not torch.equal(model(x), before)
        for mode in (True, False):
            assert_fp64(model.train(mode)(x), fresh.train(mode)(x))


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_equals_plain(name, reentrant):
    dropout = {"dropout": 0.3} if name in DROPPING else {}
    model, x, seen = adapted(name, **dropout).train(), rand(5, 16), []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        seen.append({"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in trainable(model).items()})
        x.grad = None
        model.zero_grad()
    for n in seen[0]:
        assert torch.equal(seen[0][n], seen[1][n]), n


@every
def test_tied_module_and_shared_weight(name):
    model = nn.Module()
    first, second = ("mlp", "ffn") if name in ON_FFN else ("a", "b")
    tied = MLP() if name in ON_FFN else nn.Linear(16, 16, dtype=DT)
    setattr(model, first, tied)
    setattr(model, second, tied)
    report = fastpeft.adapt(model, name, **small(name))
    assert report.adapted == [first] and getattr(model, first) is getattr(model, second) is tied
    perturb(with_masks(model))
    with fastpeft.domains.using_expert(model, 0) if name == "moa" else contextlib.nullcontext():  # it routes in the model's forward
        tied(tied(rand(3, 16))).sum().backward()
    assert all(p.grad is not None for p in trainable(model).values())
    if name in ON_FFN:
        return  # it reads no weight that another layer could share

    model = MLP()
    model.twin = nn.Linear(16, 32, dtype=DT)
    model.twin.weight = model.up.weight
    if get_recipe(name).cls.writes_base:
        with pytest.raises(ValueError, match="would be written, and 'twin' shares it"):
            fastpeft.adapt(model, name, target_modules=["up"], **small(name))
        return
    report = fastpeft.adapt(model, name, target_modules=["up"], **small(name))
    assert any("shares its weight" in n for n in report.notes)
    perturb(model)
    x = rand(3, 16)
    want = model.twin(x)
    with pytest.raises(ValueError, match=r"shares its weight|token-dependent"):
        fastpeft.merge(model)
    assert torch.equal(model.twin(x), want)


@every
def test_save_and_load(name, tmp_path):
    checkpoint = pytest.importorskip("fastpeft.checkpoint")
    model, x = fresh(name), rand(5, 16)
    plain = copy.deepcopy(model)
    adapted(name, model).eval()
    checkpoint.save_adapter(model, tmp_path)
    checkpoint.load_adapter(plain, tmp_path)
    assert torch.equal(plain.eval()(x), model(x))
