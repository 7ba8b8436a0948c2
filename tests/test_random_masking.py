"""Random Masking: its mask law, PEFT's SHiRA under the same mask, what is stored, and the learning rate of the specification."""

from __future__ import annotations

import json
import math

import pytest
import torch
from checks import DT, MLP, perturb, rand
from safetensors.torch import load_file
from test_loha import compare
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import support
from fastpeft.base import Plain
from fastpeft.method import random_masking
from fastpeft.method.random_masking import learning_rate
from fastpeft.terms import APPLY, effective_weight

pytest.importorskip("peft")
import peft

LAYER = dict(method="random_masking", dtype=DT)


# ---- the law of the mask


@pytest.mark.parametrize("density", [1.6e-5, 1e-4, 0.003, 0.05, 0.5, 0.99])
def test_the_number_of_entries_is_binomial(density):
    """Within five standard deviations, for each of eight layers, and their sum within five of its own."""
    rows, cols = 700, 901
    counts = [support.bernoulli(support.key(3, f"layer {k}"), rows, cols, density).shape[1] for k in range(8)]
    mean, var = rows * cols * density, rows * cols * density * (1 - density)
    assert all(abs(n - mean) <= 5 * math.sqrt(var) for n in counts), counts
    assert abs(sum(counts) - 8 * mean) <= 5 * math.sqrt(8 * var)
    assert len(set(counts)) > 1


def test_entries_are_spread_over_rows_and_columns_and_uncorrelated():
    rows, cols, p = 400, 800, 0.1
    mask = torch.zeros(rows, cols, dtype=DT)
    mask[tuple(support.bernoulli(support.key(1, "a"), rows, cols, p).long())] = 1
    for side, n in ((0, rows), (1, cols)):
        counts = mask.sum(side)
        assert (counts - n * p).abs().max() <= 6 * math.sqrt(n * p * (1 - p))
        # the counts' own variance is that of a binomial, within six standard errors
        assert abs(counts.var() / (n * p * (1 - p)) - 1) <= 6 * math.sqrt(2 / counts.numel())
    for shift in ((0, 1), (1, 0), (1, 1), (0, 8)):
        both = (mask * mask.roll(shift, (0, 1))).mean()
        assert abs(both - p * p) <= 6 * math.sqrt(p * p / mask.numel()), shift


def test_it_is_a_function_of_seed_and_name_in_any_chunks(monkeypatch):
    draw = lambda seed=0, name="a": support.bernoulli(support.key(seed, name), 300, 200, 0.02)  # noqa: E731
    one = draw()
    torch.manual_seed(5)
    monkeypatch.setattr(support, "CHUNK", 1000)
    assert torch.equal(draw(), one)
    for other in (draw(seed=1), draw(name="b")):
        assert other.shape != one.shape or not torch.equal(other, one)


def test_it_is_the_same_without_the_extension(monkeypatch):
    one = support.bernoulli(support.key(0, "a"), 123, 457, 0.01)
    monkeypatch.setenv("FASTPEFT_IMPL", "torch")
    assert torch.equal(support.bernoulli(support.key(0, "a"), 123, 457, 0.01), one)


def test_published_bits():
    """Written down once: another version of the generator would put a checkpoint's values elsewhere."""
    got = support.bernoulli(support.key(0, "model.layer"), 64, 48, 0.003)
    assert got.tolist() == PUBLISHED


def test_sorted_and_inside():
    index = support.bernoulli(support.key(0, "a"), 50, 70, 0.3).long()
    flat = index[0] * 70 + index[1]
    assert (flat[1:] > flat[:-1]).all() and flat[0] >= 0 and flat[-1] < 50 * 70


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.05, 0.33, 1.0])
def test_structured_masks_are_the_authors(density, tail):
    """k entries: the first rows of one column if k < out, else whole columns and a last one that is partly masked."""
    rows, cols = 30, 20
    k = int(rows * cols * density)
    want = torch.zeros(rows, cols)
    whole, rest = divmod(k, rows)
    order = list(range(cols))[:: -1 if tail else 1]
    want[:, order[:whole]] = 1
    if rest:
        want[:rest, order[whole]] = 1
    got = torch.zeros(rows, cols)
    index = support.columns(rows, cols, density, tail=tail)
    got[tuple(index.long())] = 1
    assert torch.equal(got, want) and index.shape[1] == k
    flat = index[0].long() * cols + index[1]
    assert (flat[1:] > flat[:-1]).all()


# ---- the layer


def masked_layer(index, size_in, size_out, apply, monkeypatch, bias=True):
    with monkeypatch.context() as patch:
        patch.setattr(random_masking.RandomMasking, "draw", lambda self: index)
        layer = fastpeft.AdaptedLinear(size_in, size_out, bias=bias, apply=apply, **LAYER)
    with torch.no_grad():
        layer.adapter.random_masking.values.normal_()
    return layer


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_equals_pefts_shira_under_the_same_mask(first, monkeypatch):
    for case in range(first, first + 40):
        g = torch.Generator().manual_seed(case)
        torch.manual_seed(case)
        draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))  # noqa: B023, E731
        size_in, size_out = draw(4, 40), draw(4, 40)
        rank = draw(1, max(1, size_in * size_out // (size_in + size_out)))
        count = rank * (size_in + size_out)
        flat = torch.randperm(size_in * size_out, generator=g)[:count].sort().values
        index = torch.stack([flat // size_in, flat % size_in]).to(torch.int32)
        layer = masked_layer(index, size_in, size_out, APPLY[case % 3], monkeypatch, bias=bool(case % 2))

        mask = torch.zeros(size_out, size_in)
        mask[tuple(index.long())] = 1
        config = peft.ShiraConfig(r=rank, mask_type="custom", target_modules=["0"])
        config.mask_fn = lambda base, r, **k: mask  # noqa: B023
        base = nn.Linear(size_in, size_out, bias=bool(case % 2), dtype=DT)
        base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
        theirs = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).double()
        live = theirs.base_model.model[0].shira_weight["default"]
        assert torch.equal(theirs.base_model.model[0].shira_indices["default"], index)
        values = layer.adapter.random_masking.values
        with torch.no_grad():
            live.copy_(values)
        x = rand(*[(5,), (2, 3), ()][draw(0, 2)], size_in)
        compare(layer(x), theirs(x), {"values": values, "x": x}, {"values": live, "x": x}, f"case {case}")


def test_starts_at_the_base_and_only_the_masked_entries_move():
    layer = fastpeft.AdaptedLinear(60, 50, density=0.05, **LAYER)
    before, x = layer.weight.clone(), rand(6, 60)
    assert_fp64(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    optimizer = torch.optim.AdamW(layer.adapter.parameters(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight, before)
    m = layer.adapter.random_masking
    moved = effective_weight(layer.weight, m.terms(Plain(layer.weight)), DT) != before
    assert moved.sum() == m.values.numel() > 0
    assert moved[tuple(m.index.long())].all()


def test_merge_changes_the_masked_entries_alone():
    model = MLP(torch.float32)
    before = model.up.weight.detach().clone()
    fastpeft.adapt(model, "random_masking", density=0.1)
    perturb(model)
    index = model.up.adapter.random_masking.index.long()
    merged = fastpeft.merge(model).up.weight
    untouched = torch.ones_like(before, dtype=torch.bool)
    untouched[tuple(index)] = False
    assert torch.equal(merged[untouched], before[untouched]) and (merged != before).sum() == index.shape[1]


def test_layers_have_masks_of_their_own_and_a_second_model_the_same():
    first, second = MLP(), MLP()
    for model in (first, second):
        torch.manual_seed(len(list(model.parameters())) + (model is second))
        fastpeft.adapt(model, "random_masking", density=0.2, seed=9)
    index = lambda m: m.adapter.random_masking.index  # noqa: E731
    assert torch.equal(index(first.up), index(second.up))
    assert index(first.up).shape != index(first.down).shape or not torch.equal(index(first.up), index(first.down))


def test_a_checkpoint_holds_the_seed_and_the_values(tmp_path):
    model, x = MLP(), rand(5, 16)
    torch.manual_seed(4)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    fastpeft.adapt(model, "random_masking", density=0.1, seed=77)
    perturb(model)
    fastpeft.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.rpartition(".")[2] for k in stored} == {"values"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["options"]["seed"] == 77
    again = MLP()
    again.load_state_dict(weights)
    fastpeft.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_the_mask_survives_to_empty():
    with torch.device("meta"):
        model = MLP(torch.float32)
    fastpeft.adapt(model, "random_masking", density=0.1)
    whole = MLP(torch.float32)
    fastpeft.adapt(whole, "random_masking", density=0.1)
    model.to_empty(device="cpu")
    for a, b in ((model.up, whole.up), (model.down, whole.down)):
        assert torch.equal(a.adapter.random_masking.index, b.adapter.random_masking.index)


@pytest.mark.parametrize(
    ("options", "word"),
    [(dict(density=1.5), "density"), (dict(density=-0.1), "density"), (dict(structure="middle"), "random, head, tail"),
     (dict(apply="overlay"), "copy, window, exact"), (dict(seed=0.5), "seed")],
    ids=str,
)  # fmt: skip
def test_bad_options_are_named(options, word):
    with pytest.raises((ValueError, TypeError), match=word):
        fastpeft.AdaptedLinear(8, 8, method="random_masking", **options)


# ---- as many entries as LoRA has numbers, in PEFT's format


def test_a_counted_mask_has_as_many_entries_as_lora_has_numbers():
    layer = fastpeft.AdaptedLinear(30, 20, method="random_masking", rank=3)
    m = layer.adapter.random_masking
    assert m.values.shape == (3 * 50,) and m.index.shape == (2, 150)
    flat = m.index[0].long() * 30 + m.index[1]
    assert (flat[1:] > flat[:-1]).all() and 0 <= flat[0] and flat[-1] < 600
    other = fastpeft.AdaptedLinear(30, 20, method="random_masking", rank=3, seed=1).adapter.random_masking
    assert not torch.equal(other.index, m.index)
    assert fastpeft.AdaptedLinear(4, 3, method="random_masking", rank=3).adapter.random_masking.values.shape == (12,)


@pytest.mark.parametrize("theirs_first", [False, True])
def test_folders_go_both_ways_with_pefts_shira(theirs_first, tmp_path):
    def plain():
        torch.manual_seed(6)
        return MLP()

    x = rand(5, 16)
    if theirs_first:
        config = peft.ShiraConfig(r=2, target_modules=["up", "down"], random_seed=5)
        saver = peft.get_peft_model(plain(), config, autocast_adapter_dtype=False).double()
        perturb(saver)
        saver.save_pretrained(tmp_path)
    else:
        saver = plain()
        fastpeft.adapt(saver, "random_masking", rank=2, seed=5)
        perturb(saver)
        fastpeft.save_adapter(saver, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SHIRA"
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path, autocast_adapter_dtype=False).double()
    ours = plain()
    fastpeft.load_adapter(ours, tmp_path)
    assert (ours(x) - plain()(x)).abs().max() > 0.1
    assert_fp64(ours(x), saver(x))
    assert_fp64(theirs(x), saver(x))
    # the entries that were read stay through a move
    assert_fp64(ours.to(torch.float64)(x), saver(x))


def test_a_damaged_index_is_refused(tmp_path):
    model = MLP()
    fastpeft.adapt(model, "random_masking", rank=2)
    fastpeft.save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    key = next(k for k in tensors if k.endswith("shira_indices"))
    tensors[key][0, -1] = 10_000
    save_file(tensors, file, header)
    again = MLP()
    with pytest.raises(fastpeft.CheckpointError, match="inside"):
        fastpeft.load_adapter(again, tmp_path)
    assert not any("adapter" in n for n, _ in again.named_modules())


def test_a_custom_mask_of_a_config_is_refused():
    config = peft.ShiraConfig(r=2, target_modules=["up"], mask_type="custom")
    with pytest.raises(ValueError, match="mask_type='custom'"):
        fastpeft.adapt(MLP(), config)


# ---- the learning rate


def test_learning_rate_of_the_specification():
    assert learning_rate(1e-4) == pytest.approx(1e-2)
    assert learning_rate(1e-2) == pytest.approx(1e-3)
    assert learning_rate(1e-8) == 1e-1 and learning_rate(1.0) == pytest.approx(1e-4)
    rates = [learning_rate(d) for d in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    assert rates == sorted(rates, reverse=True)


# ---- planted faults


def one_key_for_all(monkeypatch):
    monkeypatch.setattr(random_masking, "key", lambda seed, name: seed)


def coarse_draws_only(monkeypatch):
    """What 16 bits a draw would give: densities are multiples of 1 / 65536."""
    monkeypatch.setattr(support, "round", lambda x: 2**32, raising=False)


@pytest.mark.parametrize(
    ("plant", "check"),
    [(one_key_for_all, test_layers_have_masks_of_their_own_and_a_second_model_the_same),
     (coarse_draws_only, lambda: test_the_number_of_entries_is_binomial(1.6e-5))],
    ids=["one_key_for_all", "coarse_draws_only"],
)  # fmt: skip
def test_planted_fault_is_found(plant, check, monkeypatch):
    with monkeypatch.context() as planted:
        plant(planted)
        if plant is one_key_for_all:  # [32, 16] and [16, 32] differ in shape: give both layers one
            planted.setattr("test_random_masking.MLP", Square)
        with pytest.raises(AssertionError):
            check()


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)


PUBLISHED = [[2, 13, 18, 37, 37, 50], [9, 23, 35, 26, 45, 20]]
