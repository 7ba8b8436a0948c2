"""PHATGOOSE and Mixture-of-LoRAs on both paths, all experts and grouped tokens: values, gradients, checkpoints, autocast, generation."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
from checks import DT, compare, perturb, rand, with_masks
from mixtures import EXPERTS, batch, folders, mixture
from test_phatgoose import IN, OUT, routed_layer, split
from tolerance import assert_as_good, assert_fp64

import fastpeft
from bench import experts
from bench.machine import RESULTS, read_rows
from fastpeft import grouping
from fastpeft.grouping import Limit, groups
from fastpeft.ops import grouped

pytest.importorskip("transformers")
ALWAYS = Limit(active=1 << 30, total=1, source="tests")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture
def used(monkeypatch):
    """How often the grouped products ran forward; `use(True)` puts every layer past the limit, `use(False)` none."""
    calls = []
    real = grouped.Family.add
    monkeypatch.setattr(grouped.Family, "add", lambda *a: (calls.append(1), real(*a))[1])

    def use(past):
        monkeypatch.setattr(grouping, "LIMITS", {("cpu", d): (ALWAYS,) for d in DTYPES} if past else {})
        calls.clear()
        return calls

    return use


# the table


def test_no_entry_is_no_grouping():
    """What is not measured is not grouped; what is names its rows."""
    for (kind, dtype), limits in grouping.LIMITS.items():
        assert kind == "cpu", "a GPU was never measured"
        for limit in limits:
            # by the bench's own rule, for every number of active ranks that was measured up to the limit's
            measured = experts.limits(read_rows(RESULTS / limit.source))
            own = {active: total for (name, active), total in measured.items() if name == str(dtype).removeprefix("torch.")}
            assert limit.active in own
            assert all(total is not None and total <= limit.total for active, total in own.items() if active <= limit.active), own
    assert not groups((16,) * 1000, 1, torch.device("cuda"), torch.bfloat16)


def test_a_limit_is_of_active_and_of_total_ranks(monkeypatch):
    monkeypatch.setattr(grouping, "LIMITS", {("cpu", torch.float32): (Limit(16, 512, "a"), Limit(40, 1024, "b"))})
    ask = lambda ranks, k, dtype=torch.float32: groups(ranks, k, torch.device("cpu"), dtype)  # noqa: E731
    assert ask((16,) * 32, 1) and not ask((16,) * 31, 1), "512 in total"
    assert not ask((16,) * 32, 2) and ask((16,) * 64, 2) and not ask((16,) * 63, 2), "32 active ones need 1024"
    assert not ask((8,) * 127 + (48,), 1), "the largest rank counts"
    assert not ask((16,) * 64, 1, torch.bfloat16)


# PHATGOOSE


@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 0, 1, 3)], ids=str)
def test_phatgoose_in_fp64(ranks, k, used):
    layer, m = routed_layer(ranks, k)
    x = rand(2, 5, IN)
    want = papers.phatgoose(x, layer.weight, layer.bias, split(m), m.V, min(k, len(m.experts.present)))
    own = {"A": m.A, "B": m.B, "x": x} | ({"V": m.V} if k > 1 else {})
    calls = used(True)
    y = layer(x)
    assert calls
    compare(y, want, own, own)
    calls = used(False)
    assert_fp64(y, layer(x), "the two paths")
    assert not calls


@pytest.mark.parametrize("lead", [(), (0,), (2, 0)], ids=str)
def test_phatgoose_leading_dimensions(lead, used):
    layer, _ = routed_layer((2, 4, 1))
    x = rand(*lead, IN)
    want = layer(x)
    used(True)
    assert_fp64(layer(x), want)


def test_phatgoose_drops_with_all_experts(used):
    """With dropout in training no layer is grouped; without it, or in evaluation, it is."""
    layer, _ = routed_layer((2, 4, 1), dropout=0.3)
    calls = used(True)
    layer(rand(5, IN))
    assert not calls
    layer.eval()(rand(5, IN))
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_phatgoose_in_a_checkpoint(reentrant, used):
    layer, m = routed_layer((2, 4, 1))
    x = rand(7, IN)
    calls = used(True)
    want = layer(x)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    leaves = [x, m.A, m.B, m.V]
    d = torch.randn_like(want)
    wants = torch.autograd.grad(want, leaves, d)
    again.backward(d)
    assert len(calls) == 3, "once more in backward"
    for leaf, g in zip(leaves, wants, strict=True):
        assert torch.equal(leaf.grad, g)


@pytest.mark.parametrize("kind", ["bf16", "autocast"])
def test_phatgoose_in_16_bits(kind, used):
    """Among all experts, so that no rounding chooses another; each path is as good as the formula in bf16."""
    layer, m = routed_layer((2, 4, 1), 3)
    layer = layer.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    m.float()
    x = (torch.randn(64, IN) + 1).to(layer.weight.dtype)
    d = torch.randn(64, OUT, dtype=torch.bfloat16)
    own, seen = {"A": m.A, "B": m.B, "V": m.V}, []
    for how in ("grouped", "all", "exact", "plain"):
        used(how == "grouped")
        leaf = x.to(DT if how == "exact" else x.dtype).requires_grad_()
        dt = DT if how == "exact" else torch.bfloat16
        W, b, V = (t.to(dt) for t in (layer.weight, layer.bias, m.V))
        parts = [(A.to(dt), B.to(dt), s) for A, B, s in split(m)]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast" and how in ("grouped", "all")):
            y = layer(leaf) if how in ("grouped", "all") else papers.phatgoose(leaf.to(dt), W, b, parts, V, 3)
        seen.append({"y": y} | dict(zip(("x", *own), torch.autograd.grad(y, (leaf, *own.values()), d.to(y.dtype)), strict=True)))
    for name in seen[0]:
        for path in (0, 1):
            assert_as_good(seen[path][name], seen[2][name].double(), seen[3][name], f"{name}, {path}")


def test_phatgoose_compiles_and_computes_all_experts(used):
    layer, m = routed_layer((2, 4, 1))
    x = rand(5, IN)
    calls = used(True)
    want = layer(x)
    calls.clear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    own = {"A": m.A, "B": m.B, "V": m.V, "x": x}
    compare(compiled(x), want, own, own)
    assert not calls


# Mixture-of-LoRAs


@pytest.fixture
def base(llama):
    return llama.to(DT)


@pytest.fixture
def found(base, tmp_path):
    return folders(base, tmp_path)


def step(model, **call):
    """Logits and gradients of one step, by name, in fp64 throughout."""
    model.zero_grad()
    logits = model(**call).logits
    logits.backward(torch.randn(logits.shape, dtype=DT, generator=torch.Generator().manual_seed(5)))
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("domain", [[2, 0, 1, 1], [0, 0, 0, 0]], ids=str)
def test_moa_trains_the_same(base, found, domain, reentrant, used):
    """The experts' ranks differ, and one has no MLP; every sequence its own, or all the same one; both kinds of checkpoint."""
    model = with_masks(mixture(base, found).train())
    call = dict(zip(("input_ids", "labels"), batch(), strict=True)) | {"domain": domain}
    used(False)
    want = step(model, **call)
    calls = used(True)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    got = step(model, **call)
    layers = sum(hasattr(m, "adapter") for m in model.modules())
    assert len(calls) == (1 if reentrant is None else 2) * layers, "each layer once a forward"
    assert got.keys() == want.keys() and len(got) > 10
    for name in want:
        assert_fp64(got[name], want[name], name)


def test_moa_routes_the_same_with_frozen_experts(base, used):
    """Two stacks of one layer, a frozen one and one that trains; the routers choose."""
    model, (ids, labels) = copy.deepcopy(base), batch()
    fastpeft.adapt(model, "moa", experts=3, rank=2, frozen=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    with_masks(model.train())
    used(False)
    want = step(model, input_ids=ids, labels=labels)
    choices = fastpeft.domains.choices(model)
    assert len(torch.stack(list(choices.values())).unique()) > 1
    calls = used(True)
    got = step(model, input_ids=ids, labels=labels)
    assert len(calls) == 2 * sum(hasattr(m, "adapter") for m in model.modules())
    for name in want:
        assert_fp64(got[name], want[name], name)


def test_moa_under_autocast(base, used):
    """fp32 weights under bf16: the two paths differ by rounding, the same experts are used, and both are as good as one LoRA."""
    model, (ids, labels) = copy.deepcopy(base).float(), batch()
    fastpeft.adapt(model, "moa", experts=3, rank=2)
    perturb(model, 0.1).train()
    domain = torch.tensor([2, 0, 1, 1])
    seen = []
    for how in ("exact", "all", "grouped"):
        calls = used(how == "grouped")
        own = with_masks(copy.deepcopy(model).double() if how == "exact" else model)
        with torch.autocast("cpu", torch.bfloat16, enabled=how != "exact"):
            seen.append(own(ids, labels=labels, domain=domain).logits.detach())
    assert calls
    exact, plain, got = seen
    assert got.dtype is plain.dtype is torch.bfloat16 and not torch.equal(got, exact)
    assert_as_good(got, exact, plain, "logits")


@pytest.mark.parametrize("cached", [True, False])
def test_moa_generates_the_same(base, found, cached, used):
    """The prompts decide; greedy tokens of both paths are equal, with a cache and without."""
    model = mixture(base, found)
    ids = torch.randint(2, 64, (6, 6), generator=torch.Generator().manual_seed(11))
    own = dict(attention_mask=torch.ones_like(ids), max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0, use_cache=cached)
    used(False)
    want = model.generate(ids, **own)
    calls = used(True)
    assert torch.equal(model.generate(ids, **own), want)
    layers = sum(hasattr(m, "adapter") for m in model.modules())
    assert len(calls) == 7 * layers
    assert not torch.equal(base.generate(ids, **own), want) and len(EXPERTS) == 3


def test_moa_refuses_rows_of_unknown_sequences(base, found, used):
    """As on the other path: which row belongs to which sequence must be known."""
    model, (ids, _) = mixture(base, found), batch()
    used(True)
    layer = model.model.layers[0].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x.flatten(0, 1)[:-1])
    with pytest.raises(ValueError, match="which of them belong to which sequence cannot be told"):
        model(ids)


def test_one_expert_and_a_fixed_one_are_plain_loras(base, found, used):
    model, (ids, _) = mixture(base, found), batch()
    calls = used(True)
    with fastpeft.domains.using_expert(model, "law"):
        model(ids)
    layer, _ = routed_layer((3,))
    layer(rand(4, IN))
    assert not calls
