"""LISA: what trains when, the optimiser's state under each policy against torch's AdamW, memory, resuming, the ways back."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from checks import DT, MLP, perturb, rand
from procedure_runs import Blocks, Run, assert_resumes, assert_same, go, loss_of, plain, tokens, values
from safetensors.torch import load_file
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.job.measure import bytes_saved
from fastpeft.job.weights import copy_weights, set_weights
from fastpeft.train.lisa import POLICIES, blocks_of

COUNT, ACTIVE, INTERVAL = 5, 2, 3


def base(tied=False, **options):
    torch.manual_seed(1)
    model = Blocks(blocks=COUNT, **options)
    if tied:
        model.lm_head.weight = model.embed.weight
    return model


def made(tied=False, keep_base=True, **options):
    model = base(tied, **options)
    fastpeft.adapt(model, "lisa", keep_base=keep_base)
    return model


def schedule(**options):
    return [train.LISASchedule(**({"active": ACTIVE, "interval": INTERVAL, "seed": 4} | options))]


def run_of(steps=10, micros=1, *, tied=False, **options):
    return Run(functools.partial(made, tied), functools.partial(schedule, **options), tokens(steps, micros), lr=0.01)


def active(model):
    """Indices of the blocks that train; every block trains whole or not at all."""
    flags = [{p.requires_grad for p in layer.parameters()} for layer in model.layers]
    assert all(len(f) == 1 for f in flags)
    return [k for k, f in enumerate(flags) if f == {True}]


def drawn(i, active=ACTIVE):
    return train.LISASchedule(active, INTERVAL, seed=4).draw(i, COUNT)


# --- what trains


def test_exactly_the_drawn_blocks_train_and_the_others_keep_their_bits():
    """At every step; embedding, norm and head always; accumulation shortens no interval."""
    for micros in (1, 3):
        run, before = run_of(10, micros), []

        def look(model, optimizer, before=before):
            now = values(model)
            was = before[-1] if before else values(made())
            chosen = drawn(len(before) // INTERVAL)
            assert active(model) == chosen and len(chosen) == ACTIVE
            for n, t in now.items():
                block = int(n.split(".")[1]) if n.startswith("layers.") else None
                assert torch.equal(t, was[n]) == (block is not None and block not in chosen), n
            before.append(now)

        plain(run, look)
        assert len(before) == 10
    assert len({tuple(drawn(i)) for i in range(4)}) > 1, "every interval draws alike: no test of switching"


def test_flags_come_back_when_the_run_ends():
    model, _ = plain(run_of(4))
    assert all(p.requires_grad for p in model.parameters())


def test_every_block_is_drawn_as_often():
    """Frequencies over 3000 intervals lie within five standard deviations of active / count, and no draw repeats a block."""
    n, p = 3000, ACTIVE / COUNT
    draws = [drawn(i) for i in range(n)]
    assert all(len(set(d)) == ACTIVE for d in draws)
    for block in range(COUNT):
        share = sum(block in d for d in draws) / n
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n), (block, share)


def test_only_the_ends_train_beside_the_blocks_without_the_final_norm():
    model, _ = plain(run_of(4, final_norm=False))
    start = made()
    assert torch.equal(model.norm.weight, start.norm.weight) and not torch.equal(model.embed.weight, start.embed.weight)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_zeros_left_by_zero_grad_move_no_frozen_block():
    """With set_to_none=False a zero gradient would let AdamW move a block that left, by momentum and decay."""
    run, whole = run_of(10, state_policy="keep"), run_of(10, state_policy="keep")
    run.set_to_none = False
    assert_same(plain(run)[0], plain(whole)[0])


def test_tied_embedding_and_head():
    model, _ = plain(run_of(7, tied=True))
    assert model.lm_head.weight is model.embed.weight and not torch.equal(model.embed.weight, base(True).embed.weight)
    fastpeft.unload(model)
    assert_same(model, base(True))
    assert model.lm_head.weight is model.embed.weight


def test_a_frozen_layer_keeps_no_input():
    """Bytes kept for backward: those of all blocks in training, less the inputs of the frozen blocks' linears."""
    model, _, runner = run_of(1).made()
    ids = tokens(1)[0][0]
    owned = [*model.parameters(), ids]
    with runner:
        few = bytes_saved(lambda: loss_of(model, ids), owned)
    model.apply(lambda m: setattr(m, "attached", True))
    every = bytes_saved(lambda: loss_of(model, ids), owned)
    # `up` reads x [20, 8] of the residual stream, which nothing else keeps; `down` reads tanh's output, which tanh itself keeps
    assert every - few == (COUNT - ACTIVE) * 20 * 8 * 8


# --- the optimiser's state, against torch's AdamW


def test_all_blocks_and_keep_is_full_training():
    """Step for step, bit for bit, the same as AdamW on the plain model."""
    run = run_of(8, active=COUNT, state_policy="keep")
    _, mine = plain(run, look=lambda model, _: [p.detach().clone() for p in model.parameters()])
    model, seen = base(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, **run.options)
    for [ids] in run.data:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for one, two in zip(mine, seen, strict=True) for a, b in zip(one, two, strict=True))


def reference(run, policy):
    """Plain torch: an AdamW for the outside and one per block, made anew, dropped or kept as the policy says."""
    model = base()
    outside = [p for n, p in model.named_parameters() if not n.startswith("layers.")]

    def adamw(parameters):
        return torch.optim.AdamW(list(parameters), lr=run.lr, **run.options)

    ends, blocks = adamw(outside), {}
    for t, micros in enumerate(run.data):
        chosen = drawn(t // INTERVAL)
        if t % INTERVAL == 0 and policy != "keep":
            blocks = {k: o for k, o in blocks.items() if k in chosen} if policy == "drop" else {}
            ends = adamw(outside) if policy == "drop_all" else ends
        for k in chosen:
            blocks.setdefault(k, adamw(model.layers[k].parameters()))
        for ids in micros:
            (loss_of(model, ids) / len(micros)).backward()
        for optimizer in (ends, *(blocks[k] for k in chosen)):
            optimizer.step()
        model.zero_grad()
    return model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("micros", [1, 3])
def test_each_policy_equals_torch_with_the_active_parameters(policy, micros):
    run = run_of(13, micros, state_policy=policy)
    model, _ = plain(run)
    want = reference(run, "keep" if policy == "offload" else policy)
    for (n, p), q in zip(model.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_the_policies_differ():
    runs = [plain(run_of(13, state_policy=p))[0] for p in ("drop", "drop_all", "keep")]
    ends = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in runs]
    assert not any(torch.equal(a, b) for k, a in enumerate(ends) for b in ends[:k])


def test_memory_of_the_optimiser_against_adamw_in_bytes():
    """"drop" holds two numbers per parameter of the outside and the active blocks; "keep" grows to AdamW's."""

    def size(optimizer):
        return sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim())

    def held(model, optimizer):
        return size(optimizer)

    steps = 40
    _, drop = plain(run_of(steps), held)
    _, keep = plain(run_of(steps, state_policy="keep"), held)
    model = made()
    outside = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("layers."))
    block = sum(p.nbytes for p in model.layers[0].parameters())
    assert set(drop) == {2 * (outside + ACTIVE * block)}
    assert keep[0] == drop[0] and keep[-1] == 2 * (outside + COUNT * block)


# --- loops, resuming, mistakes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cut", [2, 3, 7])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, policy, tmp_path):
    assert_resumes(run_of(10, 2, state_policy=policy), cut, tmp_path / "state")


def test_accumulated_micro_batches_equal_one_batch():
    run, whole = run_of(8, 3), run_of(8)
    whole.data = [[torch.cat(micros)] for micros in run.data]
    (one, _), (three, _) = plain(whole), plain(run)
    for (n, a), b in zip(one.named_parameters(), three.parameters(), strict=True):
        assert_fp64(a.detach(), b.detach(), n)


def test_training_without_the_procedure_raises():
    model, ids = made().train(), tokens(1)[0][0]
    with pytest.raises(RuntimeError, match=r"lisa: training needs its procedure.*train.LISASchedule"):
        model(ids)
    model.eval()(ids)


def test_what_cannot_work_is_refused():
    """Frozen before the optimiser was made, more blocks than there are, no blocks, wrong arguments."""
    model = made()
    for p in model.layers[2].parameters():
        p.requires_grad_(False)
    procedures = schedule()
    optimizer = train.build_optimizer(model, procedures, torch.optim.AdamW, lr=0.01)
    with pytest.raises(ValueError, match=r"block 'layers.2' is frozen, so it could never train"):
        train.attach(model, optimizer, procedures).__enter__()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"block 'layers.2' has parameters that the optimiser does not hold"):
        train.attach(model, optimizer, schedule()).__enter__()
    with pytest.raises(ValueError, match=r"active=6 of 5 blocks \(layers.0"):
        train.attach(model, optimizer, schedule(active=6)).__enter__()
    lone = MLP()
    fastpeft.adapt(lone, "lisa")
    adamw = torch.optim.AdamW(lone.parameters())
    with pytest.raises(ValueError, match=r"MLP has no ModuleList of blocks; name them in blocks="):
        train.attach(lone, adamw, schedule()).__enter__()
    with train.attach(lone, adamw, schedule(blocks=["up", "down"], active=1)):
        assert sum(p.requires_grad for p in lone.parameters()) == 2
        lone.train()(rand(3, 16)).sum().backward()
    for options, error, words in (
        ({"active": 0}, ValueError, "active=0"),
        ({"interval": 0}, ValueError, "interval=0"),
        ({"state_policy": "forget"}, ValueError, "state_policy='forget'; it must be one of drop, drop_all, keep, offload"),
        ({"active": 1.5}, TypeError, "active=1.5"),
    ):
        with pytest.raises(error, match=words):
            train.LISASchedule(**options)
    with pytest.raises(ValueError, match="lisa trains the parameters of the model itself, and none of this MLP's has requires_grad"):
        fastpeft.adapt(MLP().requires_grad_(False), "lisa")
    with pytest.raises(ValueError, match="bias='all' with lisa"):
        fastpeft.adapt(MLP(), "lisa", bias="all")
    with pytest.raises(ValueError, match="lisa trains the weight of 'up' itself, which is quantised or replaced"):
        fastpeft.adapt(MLP(dtype=torch.float32), "lisa", quantize="nf4")
    with pytest.raises(ValueError, match=r"another schedule.*'active': \(2, 3\)"):
        train.LISASchedule(3).load_state_dict(train.LISASchedule(2).state_dict())


@pytest.mark.parametrize(("architecture", "want"), [("gpt2", "transformer.h"), ("llama", "model.layers")])
def test_blocks_of_transformers(architecture, want, request):
    model = request.getfixturevalue(architecture)
    names = fastpeft.adapt(model, "lisa").adapted
    assert blocks_of(model, dict.fromkeys(names)) == [f"{want}.0", f"{want}.1"]


# --- folders and the ways back


def test_folder_unload_and_adapters_off(tmp_path):
    """A folder holds every parameter; unload and adapters_off are exact; nothing of it with keep_base=False."""
    model, ids = plain(run_of(7))[0].eval(), tokens(1, seed=3)[0][0]
    want, start = model(ids), base()
    fastpeft.save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(list(start.parameters()))
    loaded = base()
    fastpeft.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(ids), want)
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(model(ids), start(ids))
    assert torch.equal(model(ids), want)
    merged = fastpeft.merge(copy.deepcopy(model))
    assert type(merged.layers[0].up) is nn.Linear and torch.equal(merged(ids), want)
    fastpeft.unload(model)
    assert_same(model, start)
    assert type(model.layers[0].up) is nn.Linear
    lost = made(keep_base=False)
    with pytest.raises(ValueError, match=r"unload: lisa trained 24 of the model's own parameters.*keep_base=True"):
        fastpeft.unload(lost)
    with pytest.raises(ValueError, match="export_lora: lisa trained"):
        fastpeft.export_lora(lost, tmp_path / "lora")


def test_a_head_of_modules_to_save_is_trained_saved_and_restored_once(tmp_path):
    """Also where it was frozen before; embeddings and head alone train outside of the blocks, without the final norm."""
    model, start = base(), base()
    model.lm_head.requires_grad_(False)
    report = fastpeft.adapt(model, "lisa", modules_to_save=["lm_head"])
    assert any("own parameters train; what they were is kept on the CPU" in n for n in report.notes)
    run = Run(lambda: model, functools.partial(schedule, final_norm=False), tokens(4), lr=0.01)
    plain(run)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight) and torch.equal(model.norm.weight, start.norm.weight)
    fastpeft.save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(list(start.parameters()))
    loaded, ids = base(), tokens(1, seed=3)[0][0]
    fastpeft.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded.eval()(ids), model.eval()(ids))
    fastpeft.unload(model)
    assert_same(model, start)
    assert not model.lm_head.weight.requires_grad and model.norm.weight.requires_grad


def test_the_jobs_weights_are_all_that_trains(tmp_path):
    """What a job saves and takes up holds the blocks that are frozen at the time, and GaLore's W, which has no gradient of its own."""
    for method in ("lisa", "galore"):
        model = base()
        fastpeft.adapt(model, method)
        run = Run(lambda m=model: m, schedule if method == "lisa" else lambda: [train.GaLoreProjection()], tokens(1))
        _, optimizer, runner = run.made()
        with runner:
            go(run, model, optimizer, runner)
            saved = copy_weights(model)
        assert {n for n, _ in base().named_parameters()} <= set(saved)
        other = base()
        fastpeft.adapt(other, method)
        set_weights(other, saved)
        assert_same(other, model)


def test_a_reference_pass_between_forward_and_backward():
    """adapters_off puts the first weights in their place for its time; the gradients of the pass around it are unharmed."""
    run, ids = run_of(4), tokens(1, seed=3)[0][0]
    model, optimizer, runner = run.made()
    with runner:
        go(run, model, optimizer, runner)
    model.apply(lambda m: setattr(m, "attached", True))
    want = torch.autograd.grad(loss_of(model, ids), list(model.parameters()))
    loss = loss_of(model, ids)
    with torch.no_grad(), fastpeft.adapters_off(model):
        model(ids)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), want, strict=True):
        assert torch.equal(a, b)
    assert model.embed.weight.dtype is DT


def test_what_it_was_in_the_dtype_that_it_has_now():
    model, x = perturb(made()), tokens(1, 1)[0][0]
    model.to(torch.bfloat16).eval()
    want = copy.deepcopy(base()).to(torch.bfloat16).eval()
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(loss_of(model, x), loss_of(want, x))


def test_a_model_on_the_meta_device_can_be_left():
    with torch.device("meta"):
        model = Blocks(blocks=2)
    fastpeft.adapt(model, "lisa")
    fastpeft.unload(model)
    assert not any("adapter" in n for n, _ in model.named_modules())
