"""GaLore: projections and projected gradients, galore-torch step by step, what is never formed, memory, loops, the ways back."""

from __future__ import annotations

import copy
import functools
import math

import papers
import pytest
import torch
from checks import DT, perturb, rand
from procedure_runs import (
    Blocks,
    Run,
    assert_needs_its_model,
    assert_resumes,
    assert_same,
    go,
    loss_of,
    plain,
    scaled,
    scaler_of,
    tokens,
)
from safetensors.torch import load_file
from tolerance import FP64_ROUNDING, assert_fp64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastpeft
from fastpeft import train
from fastpeft.job.measure import bytes_saved
from fastpeft.method.galore import PROJ_TYPES, GaLore
from fastpeft.train.layers import parts_of

RANK, GAP, SCALE = 3, 4, 0.5
SHAPES = {"tall": (12, 8), "wide": (8, 12), "square": (10, 10)}
parts = functools.partial(parts_of, kind=GaLore)


def made(dtype=DT, keep_base=True, **options):
    torch.manual_seed(1)
    model = Blocks(dtype=dtype)
    fastpeft.adapt(model, "galore", keep_base=keep_base, **({"rank": RANK, "gap": GAP, "scale": SCALE} | options))
    return model


def projection(**options):
    return [train.GaLoreProjection(**options)]


def run_of(steps=10, micros=1, per_layer=False, **options):
    return Run(functools.partial(made, **options), functools.partial(projection, per_layer=per_layer), tokens(steps, micros),
               cls=train.GaLoreAdamW, lr=0.01)  # fmt: skip


class Linear(nn.Module):
    """One linear whose weight's gradient is what the loss is given: y = I W^T, loss = sum(y * G^T)."""

    def __init__(self, shape, dtype=DT):
        super().__init__()
        self.layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def one_layer(shape, dtype=DT, **options):
    torch.manual_seed(2)
    model = Linear(shape, dtype)
    start = model.layer.weight.detach().clone()
    fastpeft.adapt(model, "galore", **({"rank": RANK, "gap": GAP, "scale": SCALE} | options))
    return model.train(), start


def gradients(shape, count, dtype=DT):
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(count)]


def driven(model, optimizer, runner, grads, look=lambda: None):
    """Steps in which the weight's gradient is each of `grads`."""
    eye, seen = torch.eye(grads[0].shape[1], dtype=grads[0].dtype), []
    with runner:
        for G in grads:
            (model(eye) * G.T).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
            seen.append(look())
    return seen


# --- the layer


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_z_is_the_projected_gradient(shape, proj_type):
    """Z's gradient against project(G) of the dense G; dx; and the term itself, for a Z that is not zero."""
    out, size_in = SHAPES[shape]
    layer = fastpeft.AdaptedLinear(size_in, out, method="galore", rank=RANK, proj_type=proj_type, dtype=DT)
    m, x = layer.adapter.galore, rand(2, 5, size_in)
    m.attached = True
    m.refresh(torch.randn(out, size_in, dtype=DT))
    for z in (0.0, 1.0):
        with torch.no_grad():
            m.Z.copy_(z * torch.randn_like(m.Z))
        A, B = (t.detach() for t in m.factors())
        W = (layer.weight + B @ A).detach().requires_grad_()
        got, want = layer(x), papers.linear(x, W, layer.bias)
        assert_fp64(got, want, "y")
        d = torch.randn_like(want)
        (dz, dx), (G, want_dx) = torch.autograd.grad(got, (m.Z, x), d), torch.autograd.grad(want, (W, x), d)
        assert_fp64(dx, want_dx, "dx")
        assert_fp64(dz, papers.galore_project(G, m.left, m.right), "dZ")
        assert_fp64(m.project(G), papers.galore_project(G, m.left, m.right), "project")
    right = {"std": out >= size_in, "reverse_std": out < size_in, "left": False, "right": True, "full": True}[proj_type]
    left = {"std": out < size_in, "reverse_std": out >= size_in, "left": True, "right": False, "full": True}[proj_type]
    assert (m.right is not None, m.left is not None) == (right, left)


def test_a_rank_above_the_smaller_side_is_that_side():
    for proj_type in PROJ_TYPES:
        layer = fastpeft.AdaptedLinear(8, 12, method="galore", proj_type=proj_type, dtype=DT)
        m, G = layer.adapter.galore, torch.randn(12, 8, dtype=DT)
        m.refresh(G)
        A, B = m.factors()
        assert max(m.Z.shape[0] if m.left is not None else 0, A.shape[0]) == 8 and B.shape[1] == A.shape[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_projecting_at_full_rank_loses_nothing(shape):
    """back(project(G)) = G up to the rounding of the SVD itself, in fp32, which it is made in."""
    out, size_in = SHAPES[shape]
    for proj_type in PROJ_TYPES:
        layer = fastpeft.AdaptedLinear(size_in, out, method="galore", rank=min(out, size_in), proj_type=proj_type)
        m = layer.adapter.galore
        G = gradients((out, size_in), 1, torch.float32)[0]
        m.refresh(G)
        with torch.no_grad():
            m.Z.copy_(m.project(G))
            A, B = m.factors()
            error = (B @ A - G).abs().max()
        bound = 4 * max(out, size_in) * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(G, 2)
        assert error <= bound, (proj_type, error, bound)


def test_bad_options():
    for options, error, words in (
        ({"rank": 0}, ValueError, "rank=0"),
        ({"gap": 0}, ValueError, "gap=0"),
        ({"scale": math.nan}, ValueError, "scale=nan"),
        ({"proj_type": "both"}, ValueError, "proj_type='both' at 'linear'; it must be one of std"),
        ({"gap": 2.5}, TypeError, "gap=2.5"),
    ):
        with pytest.raises(error, match=words):
            fastpeft.AdaptedLinear(8, 12, method="galore", **options)
    model, ids = made().train(), tokens(1)[0][0]
    with pytest.raises(RuntimeError, match=r"galore: training needs its procedure.*train.GaLoreProjection"):
        model(ids)
    model.eval()(ids)
    with pytest.raises(ValueError, match=r"the optimiser does not hold Z of 'layers.0.up'"):
        train.attach(model, torch.optim.SGD(model.embed.parameters(), lr=0.1), projection()).__enter__()
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="holds Z beside other parameters and has weight decay"):
        train.attach(model, adamw, projection()).__enter__()
    tied = Blocks()
    tied.layers[0].up.weight = tied.layers[1].up.weight
    with pytest.raises(ValueError, match=r"weight of 'layers.0.up' would be written, and 'layers.1.up' shares it"):
        fastpeft.adapt(tied, "galore")
    with pytest.raises(ValueError, match=r"galore trains the weight of 'layers.0.up' itself, which is quantised or replaced"):
        fastpeft.adapt(Blocks(width=32, hidden=64, dtype=torch.float32), "galore", quantize="nf4")


# --- galore-torch


def theirs_like(weights, cls, rank=RANK, proj_type="std", plain=(), gap=GAP, **options):
    """galore-torch's optimiser over copies of the weights, and over plain parameters beside them."""
    own = {"rank": rank, "update_proj_gap": gap, "scale": SCALE, "proj_type": proj_type}
    groups = [{"params": list(weights), **own}, *([{"params": list(plain)}] if plain else [])]
    return cls(groups, **options)


def compared(shape, proj_type, steps=25):
    """Weights and moments of 25 steps over seven refreshes, one layer, given gradients."""
    galore = pytest.importorskip("galore_torch")
    model, start = one_layer(SHAPES[shape], proj_type=proj_type)
    m, W = model.layer.adapter.galore, nn.Parameter(start.clone())
    settings = {"lr": 0.01, "weight_decay": 0.1}
    adamw = theirs_like([W], galore.GaLoreAdamW, proj_type=proj_type, no_deprecation_warning=True, **settings)
    procedures = projection()
    optimizer = train.build_optimizer(model, procedures, train.GaLoreAdamW, **settings)
    runner, grads = train.attach(model, optimizer, procedures), gradients(SHAPES[shape], steps)

    def look():
        state = optimizer.state[m.Z]
        return model.layer.weight.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()

    for t, (w, first, second) in enumerate(driven(model, optimizer, runner, grads, look)):
        W.grad = grads[t]
        adamw.step()
        assert_fp64(w, W.detach(), f"W at {t}")
        assert_fp64(first, adamw.state[W]["exp_avg"], f"first moment at {t}")
        assert_fp64(second, adamw.state[W]["exp_avg_sq"], f"second moment at {t}")
    assert (W - start).abs().max() > 0.01


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_given_gradients_equal_galore_torch(shape, proj_type):
    compared(shape, proj_type)


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("per_layer", [False, True])
def test_training_equals_galore_torch(micros, per_layer):
    """25 steps of a model with tall and wide layers, all other parameters in a plain group, as the official script has them."""
    galore = pytest.importorskip("galore_torch")
    run = run_of(25, micros, per_layer)
    model, seen = plain(run, look=lambda m, _: {n: p.detach().clone() for n, p in m.named_parameters() if ".adapter." not in n})
    torch.manual_seed(1)
    theirs = Blocks()
    inside = [theirs.get_submodule(n).weight for n in parts(model)]
    plainly = [p for p in theirs.parameters() if not any(p is q for q in inside)]
    optimizer = theirs_like(inside, galore.GaLoreAdamW, plain=plainly, lr=run.lr, no_deprecation_warning=True, **run.options)
    for t, batches in enumerate(run.data):
        for ids in batches:
            (loss_of(theirs, ids) / micros).backward()
        optimizer.step()
        optimizer.zero_grad()
        for n, p in theirs.named_parameters():
            assert_close_at_this_step(seen[t][n], p.detach(), f"{n} at {t}")


def assert_close_at_this_step(got, want, name):
    """The projections are fp32 SVDs of gradients that differ in their last fp64 bit, so equal inputs may differ by an fp32 unit:
    weights agree to fp32's rounding and not to fp64's."""
    assert (got - want).abs().max() <= torch.finfo(torch.float32).eps * max(1.0, want.abs().max()), name


@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_equals_galore_torch(shape):
    galore = pytest.importorskip("galore_torch")
    from transformers.optimization import Adafactor

    settings = {"lr": 0.01, "scale_parameter": False, "relative_step": False}
    model, start = one_layer(SHAPES[shape])
    W = nn.Parameter(start.clone())
    theirs = theirs_like([W], galore.GaLoreAdafactor, **settings)
    procedures = projection()
    optimizer = train.build_optimizer(model, procedures, Adafactor, **settings)
    grads = gradients(SHAPES[shape], 22)
    weights = driven(model, optimizer, train.attach(model, optimizer, procedures), grads, lambda: model.layer.weight.detach().clone())
    for t, w in enumerate(weights):
        W.grad = grads[t].clone()
        theirs.step()
        assert_fp64(w, W.detach(), f"W at {t}")


@pytest.mark.parametrize("shape", [(512, 16), (16, 512)])
def test_8_bit_adam_equals_galore_torch(shape, monkeypatch):
    """States of 4096 numbers are 8-bit blocks in both and equal to the bit; weights differ by fp32's rounding of the step at most.

    Every step refreshes: in others the two round R differently, and a number at the border of two bins may fall into either.
    """
    galore, bnb = pytest.importorskip("galore_torch"), pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: None)  # which galore-torch calls without a GPU too
    settings = {"lr": 0.01, "weight_decay": 0.1}
    model, start = one_layer(shape, torch.float32, rank=8, gap=1)
    W = nn.Parameter(start.clone())
    theirs = theirs_like([W], galore.GaLoreAdamW8bit, rank=8, gap=1, **settings)
    procedures = projection()
    optimizer = train.build_optimizer(model, procedures, bnb.optim.AdamW8bit, **settings)
    grads = gradients(shape, 22, torch.float32)

    def look():
        return model.layer.weight.detach().clone(), optimizer.state[model.layer.adapter.galore.Z]["state1"].clone()

    for t, (w, state) in enumerate(driven(model, optimizer, train.attach(model, optimizer, procedures), grads, look)):
        W.grad = grads[t].clone()
        theirs.step()
        assert state.dtype is torch.uint8 and torch.equal(state, theirs.state[W]["state1"])
        # two roundings of W a step, at most, may differ
        assert (w - W).abs().max() <= 2 * (t + 1) * torch.finfo(torch.float32).eps * W.abs().max(), t
    assert (W - start).abs().max() > 0.01


def test_torchs_adamw_differs_by_where_eps_sits():
    """With eps=0 it is GaLoreAdamW; with eps it is not."""
    ends = {}
    for eps in (0.0, 1e-2):
        for cls in (torch.optim.AdamW, train.GaLoreAdamW):
            model, _ = one_layer((12, 8))
            procedures = projection()
            optimizer = train.build_optimizer(model, procedures, cls, lr=0.01, eps=eps, weight_decay=0.1)
            driven(model, optimizer, train.attach(model, optimizer, procedures), gradients((12, 8), 6))
            ends[eps, cls] = model.layer.weight.detach()
    assert_fp64(ends[0.0, torch.optim.AdamW], ends[0.0, train.GaLoreAdamW])
    assert (ends[1e-2, torch.optim.AdamW] - ends[1e-2, train.GaLoreAdamW]).abs().max() > 1e-5


# --- the method's own properties


def test_refreshes_come_at_0_gap_and_2_gap():
    seen, last = [], None
    _, Ps = plain(run_of(10), look=lambda model, _: {n: (m.right if m.left is None else m.left).clone() for n, m in parts(model).items()})
    for P in Ps:
        seen.append({last is None or not torch.equal(P[n], last[n]) for n in P})
        last = P
    assert seen == [{t % GAP == 0} for t in range(10)]


def test_inside_a_gap_the_change_has_rank_r_and_over_gaps_more():
    run = run_of(3 * GAP)
    run.options = {"weight_decay": 0.0}
    start = made()
    _, seen = plain(run, look=lambda model, _: {n: model.get_submodule(n).weight.detach().clone() for n in parts(model)})
    for n in parts(start):
        W = [start.get_submodule(n).weight.detach(), *(s[n] for s in seen)]
        for k in range(0, 3 * GAP, GAP):
            assert 1 <= torch.linalg.matrix_rank(W[k + GAP] - W[k], atol=FP64_ROUNDING) <= RANK
        assert torch.linalg.matrix_rank(W[-1] - W[0], atol=FP64_ROUNDING) > RANK


def test_at_full_rank_sgd_is_sgd_and_adam_is_not_adam():
    for cls, same in ((torch.optim.SGD, True), (train.GaLoreAdamW, False)):
        model, start = one_layer((12, 8), rank=8, scale=1.0)
        procedures, W = projection(), nn.Parameter(start.clone())
        optimizer, other = train.build_optimizer(model, procedures, cls, lr=0.1), cls([W], lr=0.1)
        grads = gradients((12, 8), 5)
        driven(model, optimizer, train.attach(model, optimizer, procedures), grads)
        for G in grads:
            W.grad = G
            other.step()
        gap = (model.layer.weight - W).abs().max()
        # the projection is orthogonal to fp32's rounding
        assert (gap < 64 * torch.finfo(torch.float32).eps) if same else (gap > 0.05)


def test_state_sizes():
    """r min + 2 r max numbers, for the layer of the specification 3.34 million where Adam has 90.2."""
    layer = fastpeft.AdaptedLinear(11008, 4096, method="galore", device="meta")
    m = layer.adapter.galore
    held = sum(t.numel() for t in m.buffers()) + 2 * m.Z.numel()
    assert held == 128 * 4096 + 2 * 128 * 11008 == 3_342_336
    assert 2 * layer.weight.numel() == 90_177_536


def test_memory_of_the_optimiser_against_adamw_in_bytes():
    """Projections and states, over the whole model, by counting tensors after two steps."""
    run = run_of(2)
    model, optimizer, runner = run.made()
    with runner:
        go(run, model, optimizer, runner)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
    projections = sum(b.nbytes for m in parts(model).values() for b in m.buffers())
    layers = [model.get_submodule(n).weight for n in parts(model)]
    rest = sum(p.nbytes for n, p in made().named_parameters() if ".adapter." not in n) - sum(w.nbytes for w in layers)
    assert state == 2 * rest + sum(2 * 8 * RANK * max(w.shape) for w in layers)
    assert projections == sum(8 * RANK * min(w.shape) for w in layers)
    assert state + projections < 2 * (rest + sum(w.nbytes for w in layers))


class Shapes(TorchDispatchMode):
    """Shapes of everything that torch computes, views aside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and not func.is_view:
            self.seen.add(tuple(out.shape))
        return out


def test_between_refreshes_no_full_gradient_is_formed_and_the_right_side_keeps_no_x():
    model, _ = one_layer((12, 8))
    procedures, x = projection(), rand(5, 8)
    optimizer = train.build_optimizer(model, procedures, train.GaLoreAdamW, lr=0.01)
    formed, kept = [], []
    with train.attach(model, optimizer, procedures) as runner:
        for _ in range(GAP + 1):
            mode = Shapes()
            kept.append(bytes_saved(lambda: model(x), [*model.parameters(), *model.buffers()]))
            with mode:
                model(x).square().sum().backward()
            formed.append((12, 8) in mode.seen)
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    assert formed == [True, *(GAP - 1) * [False], True]
    # u [5, 3] alone; at a refresh also x [5, 8] and the one number that collects G
    assert kept == [8 * 5 * (RANK + 8) + 8, *(GAP - 1) * [8 * 5 * RANK], 8 * 5 * (RANK + 8) + 8]


# --- loops, resuming, mistakes


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_per_layer_updates_equal_the_others_bit_for_bit(micros, proj_type):
    one, two = (plain(run_of(10, micros, per_layer, proj_type=proj_type))[0] for per_layer in (False, True))
    assert_same(one, two)


def test_per_layer_drops_every_gradient_inside_the_backward():
    run = run_of(6, 2, True)
    model, optimizer, runner = run.made()
    left = []
    with runner:
        for micros in run.data:
            for k, ids in enumerate(micros):
                (loss_of(model, ids) / 2).backward()
                left.append((k, sum(p.grad is not None for p in model.parameters())))
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
    count = sum(p.requires_grad for p in model.parameters())
    assert set(left) == {(0, count), (1, 0)}


def test_accumulated_micro_batches_equal_one_batch():
    run, whole = run_of(10, 3), run_of(10)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (one, _), (three, _) = plain(whole), plain(run)
    for (n, a), b in zip(one.named_parameters(), three.parameters(), strict=True):
        assert_close_at_this_step(a.detach(), b.detach(), n)


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_step_of_fewer_micro_batches(per_layer):
    """The last step of an epoch may have fewer, one that refreshes too: the gradients that were unscaled meanwhile are recognised."""
    run = run_of(5, 3, per_layer)
    got, optimizer, runner = run.made()
    with runner:
        go(run, got, optimizer, runner, run.data[:4])
        for ids in run.data[4][:2]:
            (loss_of(got, ids) * 8 / 2).backward()
        for p in got.parameters():  # what a gradient scaler does before the step
            if p.grad is not None:
                p.grad.div_(8)
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
    whole = run_of(5, 3)
    whole.data = [[torch.cat(m)] for m in [*whole.data[:4], whole.data[4][:2]]]
    want, _ = plain(whole)
    for (n, a), b in zip(got.named_parameters(), want.parameters(), strict=True):
        assert_close_at_this_step(a.detach(), b.detach(), n)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("cut", [2, 4, 5])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, per_layer, tmp_path):
    assert_resumes(run_of(10, 2, per_layer), cut, tmp_path / "state")


def test_skipped_steps_change_nothing():
    """A gradient scaler skips a step that refreshes and one that does not, as if they had not been."""
    runs = []
    for skips in ((0, 3, 6), ()):
        runs.append(model := made(torch.float32))
        scaled(model, projection(), tokens(5), scaler_of(), skips, train.GaLoreAdamW)
    assert_same(*runs)


def test_a_gradient_that_is_not_finite_is_named():
    model, optimizer, runner = run_of(1).made()
    before = model.layers[0].up.weight.detach().clone()
    with runner:
        (loss_of(model, tokens(1)[0][0]) * math.inf).backward()
        with pytest.raises(ValueError, match=r"the gradient of 'layers.\d.\w+' is not finite at step 0"):
            optimizer.step()
    assert torch.equal(model.layers[0].up.weight, before)


def test_a_state_without_its_model_is_refused():
    assert_needs_its_model(run_of(6), r"'layers.0.up' has no projection at step 6")


def test_a_transposed_weight_trains(gpt2):
    """A Transformers Conv1D stores W transposed: one SGD step is that of the projected gradient."""
    model = gpt2.to(DT).train()
    fastpeft.adapt(model, "galore", target_modules=["mlp.c_fc"], rank=4, scale=1.0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    procedures, ids = projection(), torch.randint(0, 64, (2, 7))
    with train.attach(model, optimizer := train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.1), procedures) as runner:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
    plain_model = copy.deepcopy(model)
    fastpeft.unload(plain_model)
    plain_model(ids, labels=ids).loss.backward()
    name = "transformer.h.0.mlp.c_fc"
    G, m = plain_model.get_submodule(name).weight.grad.T, parts(model)[name]
    want = start[f"{name}.weight"].T - 0.1 * (G @ m.right.T) @ m.right
    assert_fp64(model.get_submodule(name).weight.detach().T, want)


def test_a_16_bit_weight_steps_in_fp32():
    """The step is rounded once; Z, projections and moments are fp32."""
    model, start = one_layer((12, 8), torch.bfloat16, scale=1.0)
    m, [G] = model.layer.adapter.galore, gradients((12, 8), 1, torch.bfloat16)
    procedures = projection()
    optimizer = train.build_optimizer(model, procedures, torch.optim.SGD, lr=0.5)
    driven(model, optimizer, train.attach(model, optimizer, procedures), [G])
    assert m.Z.dtype is m.right.dtype is torch.float32
    want = start.float() - 0.5 * (G.float() @ m.right.T) @ m.right
    assert (model.layer.weight.float() - want).abs().max() <= torch.finfo(torch.bfloat16).eps * want.abs().max()
    assert (model.layer.weight != start).any()


# --- folders and the ways back


def test_folder_unload_and_adapters_off(tmp_path):
    model, ids = plain(run_of(6))[0].eval(), tokens(1, seed=3)[0][0]
    torch.manual_seed(1)
    start, want = Blocks(), model(ids)
    fastpeft.save_adapter(model, tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {f"base_model.model.{n}.base_layer.weight" for n in parts(model)} <= keys and "base_model.model.embed.weight" in keys
    loaded = copy.deepcopy(start)
    fastpeft.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(ids), want)
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(model(ids), start(ids))
    assert torch.equal(model(ids), want)
    merged = fastpeft.merge(copy.deepcopy(model))
    assert_same({n: t for n, t in model.state_dict().items() if ".adapter." not in n}, merged)
    fastpeft.unload(model)
    assert_same(model, start)
    with pytest.raises(ValueError, match=r"unload: galore trained \d+ of the model's own parameters"):
        fastpeft.unload(made(keep_base=False))
    with pytest.raises(ValueError, match="export_lora: galore trained"):
        fastpeft.export_lora(made(), tmp_path / "lora")


def test_perturbed_z_is_seen_by_a_deepcopy_that_nothing_is_attached_to():
    model = perturb(plain(run_of(1))[0])
    twin = copy.deepcopy(model)
    assert all(not m.attached and m.leaf is None for m in parts(twin).values())
    assert torch.equal(model.eval()(tokens(1)[0][0]), twin.eval()(tokens(1)[0][0]))
