"""HydraLoRA in a Transformers model: generation against layers composed by hand, and training around it."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
from checks import DT, perturb
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


def prompts():
    """Rows of 5, 3 and 4 tokens, padded on the left."""
    ids = torch.randint(2, 64, (3, 5))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :1] = 0
    ids[mask == 0] = 1
    return ids, mask


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_layers_by_hand(pair, beams):
    """With and without a cache, batched and padded on the left, against each row alone, whole in every step."""
    plain, model = pair
    hand, _ = by_hand(plain, model)
    ids, mask = prompts()
    how = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, pad_token_id=1)
    rows = [r[m == 1][None] for r, m in zip(ids, mask, strict=True)]
    want = [hand.generate(r, attention_mask=torch.ones_like(r), use_cache=False, **how)[0, -5:] for r in rows]
    without = [plain.generate(r, attention_mask=torch.ones_like(r), **how)[0, -5:] for r in rows]
    assert any(not torch.equal(w, o) for w, o in zip(want, without, strict=True)), "the adapter changes nothing"
    for cache in (True, False):
        got = model.generate(ids, attention_mask=mask, use_cache=cache, **how)[:, -5:]
        assert torch.equal(got, torch.stack(want)), f"use_cache={cache}"


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
