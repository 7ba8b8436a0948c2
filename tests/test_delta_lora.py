"""Delta-LoRA: the layer against the formula, whole runs against a literal loop, its start, in-place form, folders, resuming."""

from __future__ import annotations

import copy
import functools
import math

import papers
import pytest
import torch
from checks import DT, compare, perturb, rand
from procedure_runs import (
    Blocks,
    Run,
    assert_needs_its_model,
    assert_resumes,
    assert_same,
    loss_of,
    plain,
    scaled,
    scaler_of,
    tokens,
)
from safetensors.torch import load_file
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.method.delta_lora import DeltaLoRA
from fastpeft.train.layers import parts_of

RANK, ALPHA, LAM, START = 2, 5.0, 2.0, 3
S = ALPHA / RANK
parts = functools.partial(parts_of, kind=DeltaLoRA)


def made(dtype=DT, method="delta_lora", **options):
    torch.manual_seed(1)
    model = Blocks(dtype=dtype)
    options = {"rank": RANK, "alpha": ALPHA} | ({"lam": LAM} if method == "delta_lora" else {}) | options
    fastpeft.adapt(model, method, **options)
    return model


def schedule(start=START):
    return [train.DeltaLoRASchedule(start)]


def run_of(steps=9, micros=1, start=START, **options):
    return Run(functools.partial(made, **options), functools.partial(schedule, start), tokens(steps, micros), lr=0.01)


def delta(model, n):
    """What a layer's static terms and its own W differ from the base by, dense."""
    module = model.get_submodule(n)
    return fastpeft.terms.effective_weight(module.weight, parts(model)[n].static_terms(None), DT).detach()


# --- the layer


def test_equals_the_formula_with_all_gradients():
    """dA and dB with the factor s, not (1 + lam) s; dx with the updated W; before and after the updates began."""
    for begun in (False, True):
        layer = fastpeft.AdaptedLinear(12, 10, method="delta_lora", rank=3, alpha=ALPHA, lam=LAM, dtype=DT)
        m = layer.adapter.delta_lora
        m.attached = True
        perturb(layer)
        if begun:
            m.begin(m.A, m.B)
            perturb(layer)
        x = rand(2, 5, 12)
        s = ALPHA / 3
        W = layer.weight.detach()
        if begun:
            W = papers.delta_lora_weight(W, (m.A.detach(), m.B.detach()), (m.A0, m.B0), LAM, s)
        got, want = layer(x), papers.lora(x, W, layer.bias, m.A, m.B, s)
        own = {"x": x, "A": m.A, "B": m.B}
        compare(got, want, own, own)


def test_starts_as_published_and_counts():
    layer = fastpeft.AdaptedLinear(256, 100, method="delta_lora", dtype=DT)
    m = layer.adapter.delta_lora
    assert not m.B.any() and not m.A0.any() and not m.B0.any() and not m.begun
    assert 0.95 / 16 < m.A.abs().max() <= 1 / 16
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["adapter.delta_lora.A", "adapter.delta_lora.B"]
    assert sum(p.numel() for p in m.parameters()) == 8 * 356


def test_training_without_the_procedure_raises():
    for inplace in (False, True):
        model, ids = made(inplace=inplace), tokens(1)[0][0]
        with pytest.raises(RuntimeError, match=r"delta_lora: training needs its procedure.*train.DeltaLoRASchedule"):
            model.train()(ids)
        model.eval()(ids)


def test_bad_options():
    for options, error, words in (
        ({"lam": math.inf}, ValueError, "lam=inf"),
        ({"alpha": math.nan}, ValueError, "alpha=nan"),
        ({"rank": 0}, ValueError, "rank=0"),
        ({"dropout": 0.1}, ValueError, "'dropout' does not exist for delta_lora"),
        ({"inplace": True, "dtype": torch.bfloat16}, ValueError, "inplace=True at 'linear', whose weight is torch.bfloat16.*inplace=False"),
    ):
        with pytest.raises(error, match=words):
            fastpeft.AdaptedLinear(12, 10, method="delta_lora", **options)
    with pytest.raises(ValueError, match="start=-1"):
        train.DeltaLoRASchedule(-1)


# --- runs


def literal(steps, micros=1, start=START):
    """The algorithm, step by step, with W trained by its own rule: outputs on a probe after each step, final weights."""
    model = made(method="lora")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, fastpeft.AdaptedLinear)}
    run, probe = run_of(steps, micros), tokens(1, seed=3)[0][0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.lr, **run.options)
    outputs, losses = [], []
    for t, batches in enumerate(run.data):
        for batch in batches:
            loss = loss_of(model, batch) / micros
            losses.append(loss.item())
            loss.backward()
        before = {n: (m.adapter.lora.A.detach().clone(), m.adapter.lora.B.detach().clone()) for n, m in layers.items()}
        optimizer.step()
        optimizer.zero_grad()
        if t > start:
            for n, m in layers.items():
                after = m.adapter.lora.A.detach(), m.adapter.lora.B.detach()
                m.weight.data = papers.delta_lora_weight(m.weight.data, after, before[n], LAM, S)
        outputs.append(model(probe).detach())
    return outputs, losses, fastpeft.merge(model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("micros", [1, 3])
def test_25_steps_equal_the_literal_loop(inplace, micros):
    """Outputs after each step, the loss of every micro-batch, and the deployed weights."""
    run, probe = run_of(25, micros, inplace=inplace), tokens(1, seed=3)[0][0]
    losses, real = [], run.loss
    run.loss = lambda model, batch: (lambda v: (losses.append(v.item() / micros), v)[1])(real(model, batch))
    model, outputs = plain(run, look=lambda m, _: m(probe).detach())
    want, their_losses, merged = literal(25, micros)
    for t in range(25):
        assert_fp64(outputs[t], want[t], f"step {t}")
    assert_fp64(torch.tensor(losses, dtype=DT), torch.tensor(their_losses, dtype=DT), "losses")
    plain_lora = literal(25, micros, start=99)[0]
    assert (plain_lora[-1] - want[-1]).abs().max() > 1e-2, "the updates of W do nothing"
    mine = fastpeft.merge(copy.deepcopy(model))
    for n, p in merged.named_parameters():
        assert_fp64(mine.get_parameter(n).detach(), p.detach(), n)


def test_the_snapshot_form_equals_the_in_place_form():
    """Twenty steps; deployed weights after each."""

    def look(model, optimizer):
        return {n: delta(model, n) for n in parts(model)}

    (_, one), (_, two) = (plain(run_of(20, inplace=inplace), look) for inplace in (False, True))
    for t in range(20):
        for n in one[t]:
            assert_fp64(one[t][n], two[t][n], f"{n} at {t}")


def test_w_is_untouched_up_to_step_k_plus_one_and_for_ever_by_the_snapshot_form():
    """t > K is strict: the step of index START + 1 is the first that moves W; the other form never writes it."""
    start = made().state_dict()
    for inplace in (True, False):
        moved = []

        def look(model, optimizer, moved=moved):
            moved.append({not torch.equal(model.state_dict()[f"{n}.weight"], start[f"{n}.weight"]) for n in parts(model)})

        plain(run_of(8, inplace=inplace), look)
        assert moved == [{inplace and t > START} for t in range(8)]
    begun = []
    plain(run_of(8), lambda m, _: begun.append({p.begun for p in parts(m).values()}))
    assert begun == [{t > START} for t in range(8)]


def test_what_is_deployed_has_rank_2_rank():
    model, _ = plain(run_of(12))
    for n in parts(model):
        D = delta(model, n) - model.get_submodule(n).weight.detach()
        assert RANK < torch.linalg.matrix_rank(D) <= 2 * RANK, n


def test_lam_zero_is_lora():
    (model, _), lora = plain(run_of(9, lam=0.0)), made(method="lora")
    plain(Run(lambda: lora, list, tokens(9), lr=0.01))
    for n, m in parts(model).items():
        own = lora.get_submodule(n).adapter.lora
        assert torch.equal(m.A, own.A) and torch.equal(m.B, own.B), n


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_skipped_steps_change_nothing(inplace, fused):
    """The scaler skips the very step at which the updates begin, and one after it: as without those steps."""
    runs = []
    for skips in ((2, 4), ()):
        runs.append(model := made(torch.float32, inplace=inplace))
        scaled(model, schedule(1), tokens(4), scaler_of(), skips, fused=fused)
    assert_same(*runs)
    assert inplace or all(m.begun for m in parts(runs[0]).values())


# --- loops, resuming


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("cut", [2, 4, 5, 7])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, inplace, tmp_path):
    assert_resumes(run_of(9, 2, inplace=inplace), cut, tmp_path / "state")


def test_a_state_without_its_model_is_refused():
    assert_needs_its_model(run_of(7), r"W should follow since step 4, and 'layers.0.up' has no factors of then at step 7")
    with pytest.raises(ValueError, match="the state is of start=3, here it is 4"):
        train.DeltaLoRASchedule(4).load_state_dict(schedule()[0].state_dict())


# --- folders, merge, export, unload


def test_save_load_merge_export(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = plain(run_of(8))[0].eval(), tokens(1, seed=3)[0][0]
    want = model(ids)
    fastpeft.save_adapter(model, tmp_path / "own")
    fastpeft.export_lora(model, tmp_path / "lora")
    torch.manual_seed(1)
    base = Blocks()
    loaded = copy.deepcopy(base)
    fastpeft.load_adapter(loaded, tmp_path / "own")
    assert torch.equal(loaded.eval()(ids), want)
    ranks = {t.shape[0] for n, t in load_file(tmp_path / "lora/adapter_model.safetensors").items() if "lora_A" in n}
    assert ranks == {2 * RANK}
    assert_fp64(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"), autocast_adapter_dtype=False).eval()(ids), want)
    assert_fp64(fastpeft.merge(copy.deepcopy(model))(ids), want)
    fastpeft.unload(model)
    assert_same(model, base)


def test_in_place_the_folder_holds_w_and_the_start_comes_back(tmp_path):
    model, ids = plain(run_of(8, inplace=True))[0].eval(), tokens(1, seed=3)[0][0]
    want = model(ids)
    fastpeft.save_adapter(model, tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {f"base_model.model.{n}.base_layer.weight" for n in parts(model)} <= names
    torch.manual_seed(1)
    base = Blocks()
    loaded = copy.deepcopy(base)
    fastpeft.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(ids), want)
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(model(ids), base(ids))
    assert torch.equal(model(ids), want)
    with pytest.raises(ValueError, match=r"export_lora: delta_lora trained 6 of the model's own parameters"):
        fastpeft.export_lora(model, tmp_path / "lora")
    assert_fp64(fastpeft.merge(copy.deepcopy(model))(ids), want)
    fastpeft.unload(model)
    assert_same(model, base)


def test_in_place_without_the_start_there_is_no_way_back():
    model = made(inplace=True, keep_base=False)
    with pytest.raises(ValueError, match=r"unload: delta_lora trained 6 of the model's own parameters.*keep_base=True"):
        fastpeft.unload(model)
    with pytest.raises(ValueError, match="adapters_off: delta_lora trained"), fastpeft.adapters_off(model):
        pass
    fastpeft.merge(model)
    assert type(model.layers[0].up) is nn.Linear
    with pytest.raises(ValueError, match="keep_base=False, but delta_lora replaces no base weight"):
        made(keep_base=False)


def test_in_place_refuses_shared_and_quantised_weights():
    model = Blocks()
    model.layers[0].up.weight = model.layers[1].up.weight
    with pytest.raises(ValueError, match=r"weight of 'layers.0.up' would be written, and 'layers.1.up' shares it"):
        fastpeft.adapt(model, "delta_lora", rank=RANK, inplace=True)
    model = Blocks(width=32, hidden=64, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"delta_lora trains the weight of 'layers.0.up' itself, which is quantised or replaced"):
        fastpeft.adapt(model, "delta_lora", rank=RANK, inplace=True, quantize="nf4")
    assert type(model.layers[0].up) is nn.Linear
    fastpeft.adapt(model, "delta_lora", rank=RANK, quantize="nf4")  # the snapshot form writes nothing
