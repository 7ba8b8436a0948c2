"""PHATGOOSE in a Transformers model: generation against layers composed by hand, token by token, and gate training around it."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
from checks import DT, perturb
from generating import assert_generates, prompts
from tolerance import assert_fp64

import fastpeft
from fastpeft.experts import read_experts

EXPERTS = {"a": dict(rank=2, alpha=3), "b": dict(rank=3, alpha=3, rslora=True), "c": dict(rank=2, alpha=4)}
SOME = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def folders(llama, tmp_path):
    """(plain fp64 model, name -> gated expert folder); expert c sits on a part of the layers."""
    llama.double()
    for name, options in EXPERTS.items():
        model = copy.deepcopy(llama)
        fastpeft.adapt(model, "lora", target_modules=SOME if name == "c" else None, **options)
        fastpeft.save_adapter(perturb(model), tmp_path / f"{name}_lora")
        gating = copy.deepcopy(llama)
        fastpeft.adapt(gating, "phatgoose", experts={name: tmp_path / f"{name}_lora"}, stage="gate")
        fastpeft.save_adapter(perturb(gating, 1.0), tmp_path / name)
    return llama, {name: tmp_path / name for name in EXPERTS}


def by_hand(plain, found, layer):
    """A copy of `plain` whose linears compute layer(x, W, b, experts, gates); (A, B, s) and gates of those that each has."""
    model = copy.deepcopy(plain)
    for site in found[0].factors:
        own = [e for e in found if site in e.factors]
        module, experts, gates = model.get_submodule(site), [e.factors[site] for e in own], [e.gates[site] for e in own]
        module.forward = lambda x, m=module, f=experts, g=gates: layer(x, m.weight, m.bias, f, g)
    return model


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_layers_by_hand(folders, beams):
    plain, paths = folders
    found = read_experts(plain, paths)
    reference = by_hand(plain, found, lambda x, W, b, f, g: papers.phatgoose(x, W, b, f, g, 2))
    model = copy.deepcopy(plain)
    report = fastpeft.adapt(model, "phatgoose", experts=paths)
    assert len(report.adapted) == 14 and report.trainable == 0
    assert_generates(model, reference, plain, beams)


def test_a_padded_row_has_the_logits_of_the_row_alone(folders):
    plain, paths = folders
    fastpeft.adapt(plain, "phatgoose", experts=paths)
    ids, mask = prompts()
    with torch.no_grad():
        padded = plain(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        for row, m, got in zip(ids, mask, padded, strict=True):
            assert_fp64(got[m == 1], plain(row[m == 1][None]).logits[0])


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_gates_train_under_checkpointing_with_a_reference_forward_between(folders, reentrant):
    """Two micro-batches, then a forward of the base model, then both backwards: the gradients of gates written by hand."""
    plain, paths = folders
    (expert,) = read_experts(plain, {"a": paths["a"]})
    leaves = {site: v.clone().requires_grad_() for site, v in expert.gates.items()}
    hand = by_hand(
        plain.requires_grad_(False),
        [type(expert)("a", expert.factors, leaves)],
        lambda x, W, b, f, g: papers.phatgoose_gate(x, W, b, f[0][0], f[0][1], g[0], f[0][2]),
    )
    ids, mask = prompts()
    batches = [dict(input_ids=ids[k], attention_mask=mask[k], labels=ids[k]) for k in (slice(0, 2), slice(1, 3))]
    sum(hand(**b).loss for b in batches).backward()

    model = copy.deepcopy(plain).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    fastpeft.adapt(model, "phatgoose", experts={"a": paths["a"]}, stage="gate")
    losses = [model(**b).loss for b in batches]
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(model(**batches[0]).logits, plain(**batches[0]).logits)
    for loss in losses:
        loss.backward()
    for site, leaf in leaves.items():
        m = model.get_submodule(site).adapter.phatgoose
        assert leaf.grad.abs().max() > 0 and leaf.dtype is DT
        assert_fp64(m.V.grad[0], leaf.grad, site)
        assert m.A.grad is None and m.B.grad is None
