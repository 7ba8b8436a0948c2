"""HydraLoRA in a Transformers model: generation against layers composed by hand, and training around it."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
from checks import DT, perturb
from generating import assert_generates, prompts
from tolerance import assert_fp64

import fastpeft
from fastpeft.record import adapted_modules

OPTIONS = dict(rank=2, alpha=3, heads=3)


@pytest.fixture
def pair(llama):
    """(plain fp64 model, the same with hydralora, moved from its start)."""
    llama.double()
    model = copy.deepcopy(llama)
    fastpeft.adapt(model, "hydralora", **OPTIONS)
    return llama, perturb(model)


def by_hand(plain, model):
    """A copy of `plain` whose linears compute the paper's formula, and its own factors (A, B, G) by layer."""
    hand, leaves = copy.deepcopy(plain).requires_grad_(False), {}
    for site, layer in adapted_modules(model).items():
        m, module = layer.adapter.hydralora, hand.get_submodule(site)
        leaves[site] = A, B, G = [t.detach().clone().requires_grad_() for t in (m.A, m.B, m.G)]
        module.forward = lambda x, w=module, A=A, B=B, G=G: papers.hydralora(x, w.weight, w.bias, A, B.split(2, 1), G, 1.5)
    return hand, leaves


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_layers_by_hand(pair, beams):
    plain, model = pair
    hand, _ = by_hand(plain, model)
    assert_generates(model, hand, plain, beams)


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_trains_under_checkpointing_with_a_reference_forward_between(pair, reentrant):
    """Two micro-batches, then a forward of the base model, then both backwards: the gradients of the formula written by hand."""
    plain, model = pair
    hand, leaves = by_hand(plain, model)
    ids, mask = prompts()
    batches = [dict(input_ids=ids[k], attention_mask=mask[k], labels=ids[k]) for k in (slice(0, 2), slice(1, 3))]
    sum(hand(**b).loss for b in batches).backward()
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    losses = [model(**b).loss for b in batches]
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(model(**batches[0]).logits, plain(**batches[0]).logits)
    for loss in losses:
        loss.backward()
    for site, own in leaves.items():
        m = model.get_submodule(site).adapter.hydralora
        for name, leaf in zip("ABG", own, strict=True):
            assert leaf.grad.abs().max() > 0 and leaf.dtype is DT
            assert_fp64(m.get_parameter(name).grad, leaf.grad, f"{site} {name}")
