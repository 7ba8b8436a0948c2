"""overlay=True: the sparse update lives in W between forwards; what it computes, how it ends, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from checks import DT, MLP, perturb, rand, with_masks
from tolerance import assert_fp64
from torch import nn

import fastpeft


def adapted(name="random_masking", overlay=True, dtype=DT):
    torch.manual_seed(3)
    model = MLP(dtype)
    options = dict(density=0.1, rank=2) if name == "rosa" else dict(density=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fastpeft.adapt(model, name, overlay=overlay, **options)
    torch.manual_seed(4)
    if name == "rosa":
        with_masks(model)
    return perturb(model), before


def steps(model, x, count=3):
    optimizer, seen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1), []
    for _ in range(count):
        y = model(x)
        y.square().sum().backward()
        seen += [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("dtype", [DT, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["random_masking", "rosa"])
def test_equals_a_copy_to_the_bit_over_training_steps(name, dtype):
    x = torch.randn(5, 16, dtype=dtype)
    results = [steps(adapted(name, overlay, dtype)[0], x) for overlay in (False, True)]
    assert len(results[0]) >= 9
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["random_masking", "rosa"])
def test_the_weight_holds_it_between_forwards_and_unload_restores_every_bit(name):
    model, before = adapted(name)
    model(rand(5, 16))
    assert (model.up.weight != before["up.weight"]).sum() == model.up.adapter.get_submodule(name).values.numel()
    fastpeft.unload(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_merge_counts_it_once():
    model, _ = adapted()
    x = rand(5, 16)
    want = model(x).detach()
    assert_fp64(fastpeft.merge(model)(x).detach(), want)


def test_a_state_dict_holds_the_weight_as_it_was():
    model, before = adapted()
    x = rand(5, 16)
    want = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert torch.equal(model(x), want)


def test_so_does_the_state_dict_of_a_conv1d(gpt2):
    before = {k: v.clone() for k, v in gpt2.state_dict().items()}
    fastpeft.adapt(gpt2, "random_masking", density=0.1, overlay=True)
    perturb(gpt2)
    gpt2(torch.tensor([[1, 2, 3]]))
    assert not torch.equal(gpt2.transformer.h[0].attn.c_attn.weight, before["transformer.h.0.attn.c_attn.weight"])
    state = gpt2.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_copies_and_pickles_are_independent():
    model, before = adapted()
    x = rand(5, 16)
    want = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
        fastpeft.unload(twin)
        assert torch.equal(twin.up.weight, before["up.weight"])
        assert torch.equal(model(x), want)


def test_a_layer_that_changes_its_dtype_keeps_its_entries():
    model, before = adapted(dtype=torch.float32)
    model(torch.randn(5, 16))
    model.double()
    model(rand(5, 16))
    fastpeft.unload(model)
    assert torch.equal(model.up.weight, before["up.weight"].double())


# ---- refusals


def test_a_reference_forward_waits_for_the_backward():
    model, before = adapted()
    x = rand(5, 16)
    y = model(x)
    with pytest.raises(RuntimeError, match="backward has not run"), fastpeft.adapters_off(model):
        pass
    (dx,) = torch.autograd.grad(y.sum(), x)
    with fastpeft.adapters_off(model), torch.no_grad():
        reference = model(x)
    plain = MLP()
    plain.load_state_dict(before)
    assert_fp64(reference, plain(x).detach())
    again = model(x)
    assert torch.equal(again, y)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], dx)


def test_a_dropped_graph_is_no_reason_to_wait():
    model, _ = adapted()
    y = model(rand(5, 16))
    del y
    with fastpeft.adapters_off(model):
        pass


def test_a_reference_forward_with_a_graph_of_its_own_is_refused():
    model, _ = adapted()
    with fastpeft.adapters_off(model), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        model(rand(5, 16))


def test_shared_weights_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

    model = Tied()
    with pytest.raises(ValueError, match="shares"):
        fastpeft.adapt(model, "random_masking", overlay=True, target_modules=["a"])
    assert type(model.a) is nn.Linear
    with pytest.raises(ValueError, match="weight of the linear that was given"):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(8, 8), "random_masking", overlay=True)


def test_compiled_code_and_a_dropped_gain_are_refused():
    model, _ = adapted()
    with pytest.raises(Exception, match="compiled code cannot"):
        torch.compile(model, backend="eager", fullgraph=True)(rand(5, 16))
    model = MLP()
    fastpeft.adapt(model, ["dora", "random_masking"], dropout=0.2, rank=None, overlay=True) if False else None
    both = MLP()
    fastpeft.adapt(both, ["random_masking", "dora"], overlay=True, density=0.1, dropout=0.2, rank=2)
    with pytest.raises(ValueError, match="gain with dropout"):
        both.train()(rand(5, 16))
