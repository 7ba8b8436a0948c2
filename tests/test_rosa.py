"""RoSA: the layer against the paper's formula, masks against a dense recomputation, timetables, folders and mask files."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand, seed_after, with_masks
from safetensors.torch import load_file, save_file
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import train
from fastpeft.terms import Dense, LowRank, Sparse

IN, OUT, RANK, ALPHA, DENSITY = 12, 10, 3, 7.0, 0.2


def layer_of(**options):
    options = {"rank": RANK, "alpha": ALPHA, "density": DENSITY} | options
    layer = fastpeft.AdaptedLinear(IN, OUT, method="rosa", dtype=DT, **options)
    return layer, layer.adapter.rosa


def adapted(model=None, **options):
    model = model or MLP()
    fastpeft.adapt(model, "rosa", **({"rank": RANK, "density": DENSITY} | options))
    return model


def sites(model):
    return {n: m.adapter.rosa for n, m in model.named_modules() if isinstance(m, fastpeft.AdaptedLinear)}


def fitted(model, *procedures, lr=0.05, cls=torch.optim.AdamW, **options):
    """(optimizer, runner) of a fresh run."""
    optimizer = train.build_optimizer(model, procedures, cls, lr=lr)
    return optimizer, train.attach(model, optimizer, procedures, **options)


def steps(model, optimizer, runner, batches, look=lambda: None):
    """One step per entry of `batches`, each a list of micro-batches; what `look` sees after backward, per step."""
    seen = []
    for micros in batches:
        for x in micros:
            (model(x).square().sum() / len(micros)).backward()
        seen.append(look())
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
    return seen


def batches(count, accumulation=1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(4, 16, dtype=DT, generator=generator) for _ in range(accumulation)] for _ in range(count)]


# --- the layer


@pytest.mark.parametrize(("dropout", "rslora", "apply"), list(itertools.product([0.0, 0.3], [False, True], ["copy", "window", "exact"])))
def test_equals_the_formula_with_all_gradients(dropout, rslora, apply):
    layer, m = layer_of(dropout=dropout, rslora=rslora, apply=apply)
    perturb(with_masks(layer))
    W, x, seed = layer.weight.detach().clone(), rand(2, 5, IN), seed_after(21)
    got = layer(x)
    mask = fastpeft.dropout_mask(seed, x.shape, dropout) if dropout else None
    s = ALPHA / math.sqrt(RANK) if rslora else ALPHA / RANK
    want = papers.rosa(x, layer.weight, layer.bias, m.A, m.B, s, m.values, m.index, mask)
    assert_fp64(got, want, "y")
    leaves, d = {"x": x, "A": m.A, "B": m.B, "values": m.values}, torch.randn_like(want)
    pairs = zip(leaves, *(torch.autograd.grad(y, list(leaves.values()), d) for y in (got, want)), strict=True)
    for name, a, b in pairs:
        assert_fp64(a, b, name)
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize("x_trains", [True, False])
def test_a_sparse_part_alone(x_trains):
    layer, m = layer_of(rank=0)
    perturb(with_masks(layer))
    assert m.A is None and m.B is None and [n for n, _ in m.named_parameters()] == ["values"]
    x = rand(5, IN, grad=x_trains)
    zero = torch.zeros(1, IN, dtype=DT), torch.zeros(OUT, 1, dtype=DT)
    got, want = layer(x), papers.rosa(x, layer.weight, layer.bias, *zero, 1.0, m.values, m.index)
    assert_fp64(got, want, "y")
    leaves = [m.values, x] if x_trains else [m.values]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
        assert_fp64(a, b)


@pytest.mark.parametrize("density", [0.003, 0.01, 0.29, 0.5, 1.0])
def test_starts_as_published(density):
    """Identity; A Kaiming uniform, B and values zero; exactly int(density * out * in) entries, none chosen yet."""
    layer = fastpeft.AdaptedLinear(256, 100, method="rosa", density=density, dtype=DT)
    m, x = layer.adapter.rosa, rand(3, 256)
    assert m.index.dtype == torch.int32 and tuple(m.index.shape) == (2, int(density * 100 * 256)) and (m.index == -1).all()
    assert m.values.numel() == m.index.shape[1] and not m.values.any() and not m.B.any()
    assert 0.95 / 16 < m.A.abs().max() <= 1 / 16
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert_fp64(layer.eval()(x), plain)
    assert_fp64(with_masks(layer).train()(x), plain)


def test_without_a_mask_training_raises_and_evaluation_is_lora():
    layer, m = layer_of()
    perturb(layer)
    x = rand(5, IN)
    with pytest.raises(RuntimeError, match=r"rosa: 'linear' has no mask.*RoSASchedule.*load_masks"):
        layer(x)
    got, want = layer.eval()(x), papers.lora(x, layer.weight, layer.bias, m.A, m.B, ALPHA / RANK)
    assert_fp64(got, want)
    got.sum().backward()
    assert m.values.grad is None and m.A.grad is not None


def test_without_a_mask_a_sparse_part_alone_is_the_base():
    layer, _ = layer_of(rank=0)
    x = rand(5, IN)
    assert_fp64(layer.eval()(x), papers.linear(x, layer.weight, layer.bias))


def test_density_zero_is_lora():
    layer, m = layer_of(density=0.0)
    perturb(layer)
    x = rand(5, IN)
    assert m.values is None and "index" not in m.state_dict()
    assert_fp64(layer.train()(x), papers.lora(x, layer.weight, layer.bias, m.A, m.B, ALPHA / RANK))


def test_bad_options():
    for options, error, words in (
        ({"rank": 0, "density": 0.0}, ValueError, "rank=0 and density=0.0 at 'linear'.*leave nothing to train"),
        ({"rank": 11}, ValueError, "rank=11.*0 to 10"),
        ({"density": 1.5}, ValueError, "density=1.5.*0 to 1"),
        ({"density": -0.1}, ValueError, "density=-0.1"),
        ({"density": math.nan}, ValueError, "density=nan"),
        ({"apply": "overlay"}, ValueError, "apply='overlay'.*copy, window, exact"),
        ({"rank": 2.0}, TypeError, "rank=2.0"),
    ):
        with pytest.raises(error, match=words):
            layer_of(**options)


# --- masks


def dense_gradients(model, x):
    """dL/dW of each rosa layer at x, by autograd on the dense weights of the formula."""
    weights = {}

    def layer(name, module, x):
        m = module.adapter.rosa
        weights[name] = W = module.weight.detach().clone().requires_grad_()
        y = papers.linear(x, W, module.bias)
        return y if m.A is None else y + papers.low_rank(x, m.A, m.B, m.scale)

    y = layer("down", model.down, torch.tanh(layer("up", model.up, x)))
    return dict(zip(weights, torch.autograd.grad(y.square().sum(), list(weights.values())), strict=True))


def densely(score, grads, nnz):
    """[2, nnz] of the entries that `score` ranks first, from the gradients of all micro-batches."""
    stack = torch.stack(grads)
    ranked = {"mean_sq": stack.square().mean(0), "mean_abs": stack.abs().mean(0), "mean_signed": stack.mean(0).abs()}[score]
    flat = ranked.flatten().topk(nnz).indices.sort().values
    return torch.stack([flat // ranked.shape[1], flat % ranked.shape[1]]).to(torch.int32)


@pytest.mark.parametrize(("score", "accumulation", "rank"), list(itertools.product(train.rosa.SCORES, [1, 3], [0, RANK])))
def test_masks_equal_a_dense_recomputation(score, accumulation, rank):
    """wl1 with two collecting steps: of every micro-batch of steps 1 and 2, at the parameters of that step."""
    model, collected = perturb(adapted(rank=rank), 0.1), []
    optimizer, runner = fitted(model, train.RoSASchedule("wl1" if rank else "wl0", 2, score), accumulation=accumulation)
    first = 1 if rank else 0
    with runner:
        for step, micros in enumerate(batches(first + 2, accumulation)):
            if step >= first:
                collected += [dense_gradients(model, x) for x in micros]
            assert not any(m.masked for m in sites(model).values())
            steps(model, optimizer, runner, [micros])
        for name, m in sites(model).items():
            assert m.masked and torch.equal(m.index, densely(score, [g[name] for g in collected], m.values.numel())), name
    picks = [densely(s, [g["up"] for g in collected], 64).tolist() for s in train.rosa.SCORES]
    assert all(a != b for a, b in itertools.combinations(picks, 2)), "the scores choose alike: no test of which one was used"


def test_collection_holds_one_layer_at_a_time_and_no_parameter_moves():
    """The leaf has one number of storage and keeps no gradient; parameters stay the same objects throughout."""
    model = adapted()
    before = {n: id(p) for n, p in model.named_parameters()}
    optimizer, runner = fitted(model, train.RoSASchedule("wl0"))

    def look():
        return [(m.leaf.untyped_storage().nbytes(), m.leaf.grad) for m in sites(model).values()]

    with runner:
        assert steps(model, optimizer, runner, batches(1), look) == [[(8, None), (8, None)]]
        assert all(m.leaf is None for m in sites(model).values())
        steps(model, optimizer, runner, batches(2))
    assert {n: id(p) for n, p in model.named_parameters()} == before


def test_a_module_used_twice_is_scored_by_its_whole_gradient():
    layer = nn.Linear(6, 6, dtype=DT)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    fastpeft.adapt(model, "rosa", rank=0, density=0.3)
    x = rand(4, 6, grad=False)
    optimizer, runner = fitted(model, train.RoSASchedule("wl0"))
    with runner:
        steps(model, optimizer, runner, [[x]])
    W = layer.weight.detach().clone().requires_grad_()
    y = papers.linear(torch.tanh(papers.linear(x, W, layer.bias)), W, layer.bias)
    (G,) = torch.autograd.grad(y.square().sum(), W)
    assert torch.equal(layer.adapter.rosa.index, densely("mean_sq", [G], 10))


@pytest.mark.parametrize("reentrant", [True, False])
def test_collection_under_checkpointing(reentrant):
    plain, checkpointed = adapted(), None
    checkpointed = copy.deepcopy(plain)
    inner = checkpointed.forward
    checkpointed.forward = lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant)
    data = [[x.requires_grad_() for x in micros] for micros in batches(2)]
    for model in (plain, checkpointed):
        optimizer, runner = fitted(model, train.RoSASchedule("wl0", 2))
        with runner:
            steps(model, optimizer, runner, data)
    for name, m in sites(plain).items():
        assert m.masked and torch.equal(m.index, sites(checkpointed)[name].index)


def test_bf16_weights_are_scored_in_fp32():
    torch.manual_seed(3)
    model = adapted(MLP(dtype=torch.bfloat16), rank=0)
    x = torch.randn(64, 16).bfloat16()
    optimizer, runner = fitted(model, train.RoSASchedule("wl0"))
    seen = {}
    with runner:
        model(x).float().square().sum().backward()
        seen = {n: s.dtype for n, s in runner.procedures[0]._sums.items()}
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
    assert seen == {"up": torch.float32, "down": torch.float32}
    dz = 2 * model.eval()(x).detach().float()
    G = dz.bfloat16().double().t() @ torch.tanh(model.up(x)).double()
    assert torch.equal(model.down.adapter.rosa.index, densely("mean_sq", [G], model.down.adapter.rosa.values.numel()))


def test_scores_that_rank_nothing():
    """NaN and overflow raise, naming the layer; a layer without gradient takes its first entries and says so."""
    for poison in (math.nan, math.inf):
        model = adapted(rank=2)
        optimizer, runner = fitted(model, train.RoSASchedule("wl0"))
        with runner, pytest.raises(ValueError, match="score of 'up' is not finite"):
            (model(batches(1)[0][0]) * poison).sum().backward()
            optimizer.step()
            runner.step_end()
    model = adapted(rank=2)
    optimizer, runner = fitted(model, train.RoSASchedule("wl0"))
    with runner:
        (0 * model(batches(1)[0][0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with pytest.warns(UserWarning) as said:
            runner.step_end()
        for w, name in zip(said, ("up", "down"), strict=True):
            assert f"no gradient reached '{name}' while collecting; its mask is its first entries" in str(w.message)
    n = model.up.adapter.rosa.values.numel()
    assert torch.equal(model.up.adapter.rosa.index.long(), torch.stack([torch.arange(n) // 16, torch.arange(n) % 16]))


# --- timetables


def observed(model, schedule, count, accumulation=1, **options):
    """Per step: terms in the forward, whether values and A have a gradient after backward."""
    optimizer, runner = fitted(model, train.RoSASchedule(schedule, **options), accumulation=accumulation)

    def look():
        m = model.up.adapter.rosa
        kinds = tuple(type(t) for t in m.terms(None))
        return kinds, m.values.grad is not None, m.A is not None and m.A.grad is not None

    with runner:
        return steps(model, optimizer, runner, batches(count, accumulation), look)


LOW = ((LowRank,), False, True)
COLLECT = ((LowRank, Dense), False, True)
BOTH = ((LowRank, Sparse), True, True)
TIMETABLES = {
    "wl64": ("wl64", 1, [LOW] * 64 + [COLLECT] + [BOTH] * 4),
    "wl0 with four gradients": ("wl0", 4, [COLLECT] * 4 + [BOTH] * 3),
    "default": ("default", 1, [COLLECT] + [BOTH] * 3),
    "wl2 with three gradients": ("wl2", 3, [LOW] * 2 + [COLLECT] * 3 + [BOTH] * 3),
    "spa_only": ("spa_only", 2, [((LowRank, Dense), False, False)] * 2 + [((LowRank, Sparse), True, False)] * 3),
    "lora_only": ("lora_only", 1, [LOW] * 5),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", list(TIMETABLES))
def test_timetable(name, accumulation):
    schedule, grads, want = TIMETABLES[name]
    got = observed(adapted(), schedule, len(want), accumulation, grads=grads)
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a == b, f"step {step}"


def test_spa_only_without_a_low_rank_part():
    got = observed(adapted(rank=0), "spa_only", 4, grads=1)
    assert got == [((Dense,), False, False)] + [((Sparse,), True, False)] * 3


def test_spa_only_leaves_the_low_rank_part_as_it_was():
    model = perturb(adapted())
    before = copy.deepcopy({n: p for n, p in model.named_parameters() if not n.endswith("values")})
    observed(model, "spa_only", 5)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert model.up.adapter.rosa.values.any() and model.up.adapter.rosa.A.requires_grad


def test_a_step_that_the_scaler_skips_counts_for_nothing():
    """Skipped at step 1 of two collecting ones: it is taken again, and what was collected before it is dropped."""
    model = adapted()
    optimizer, runner = fitted(model, train.RoSASchedule("wl0", 2))
    first, second, third = batches(3)
    with runner:
        steps(model, optimizer, runner, [first])
        model(second[0]).square().sum().backward()
        optimizer.zero_grad()
        runner.step_end()
        assert runner.ctx.step == 1 and not model.up.adapter.rosa.masked
        want = dense_gradients(model, third[0])
        steps(model, optimizer, runner, [third])
    for name, m in sites(model).items():
        assert torch.equal(m.index, densely("mean_sq", [want[name]], m.values.numel()))


def test_evaluation_and_quiet_passes_are_not_collected():
    model = adapted()
    optimizer, runner = fitted(model, train.RoSASchedule("wl0"))
    (x,), (other,) = batches(2)
    want = dense_gradients(model, x)
    with runner:
        model(x).square().sum().backward()
        model.eval()
        model(other).sum().backward()
        model.train()
        with runner.quiet():
            (100 * model(other)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        runner.step_end()
    for name, m in sites(model).items():
        assert torch.equal(m.index, densely("mean_sq", [want[name]], m.values.numel()))


def test_a_reference_pass_between_forward_and_backward_changes_nothing():
    one, two = adapted(), None
    two = copy.deepcopy(one)
    for model in (one, two):
        optimizer, runner = fitted(model, train.RoSASchedule("wl0"))
        with runner:
            for (x,) in batches(4):
                loss = model(x).square().sum()
                if model is two:
                    with torch.no_grad(), fastpeft.adapters_off(model):
                        model(x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                runner.step_end()
    for (n, p), q in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(p, q), n


# --- optimiser, errors


def test_sparse_values_have_their_own_learning_rate():
    model = adapted()
    optimizer = train.build_optimizer(model, [train.RoSASchedule()], torch.optim.AdamW, lr=7e-4, weight_decay=0.1)
    low, sparse = optimizer.param_groups
    assert (low["lr"], low["weight_decay"], sparse["lr"], sparse["weight_decay"]) == (7e-4, 0.1, 2e-4, 0.0)
    assert {id(p) for p in sparse["params"]} == {id(m.values) for m in sites(model).values()}
    assert {id(p) for p in low["params"]} == {id(p) for m in sites(model).values() for p in (m.A, m.B)}
    other = train.build_optimizer(model, [train.RoSASchedule(sparse_lr=1e-3)], torch.optim.SGD, lr=1.0)
    assert other.param_groups[1]["lr"] == 1e-3


def test_report_names_the_procedure():
    report = fastpeft.adapt(MLP(), "rosa", rank=2)
    assert report.procedures == ["RoSASchedule"] and "procedures to attach: RoSASchedule" in str(report)
    assert fastpeft.adapt(MLP(), "lora").procedures == []


def test_bad_schedules():
    for options, words in (
        ({"schedule": "wl"}, "schedule='wl'.*'spa_only' or 'lora_only'"),
        ({"schedule": "wl-1"}, "schedule='wl-1'"),
        ({"schedule": 64}, "schedule=64"),
        ({"grads": 0}, "grads=0.*at least 1"),
        ({"score": "mean"}, "score='mean'.*mean_sq, mean_signed, mean_abs"),
        ({"after": "stop"}, "after='stop'"),
        ({"sparse_lr": 0}, "sparse_lr=0"),
    ):
        with pytest.raises(ValueError, match=words):
            train.RoSASchedule(**options)


def test_models_that_a_schedule_does_not_fit():
    def entered(model, *procedures, params=None):
        optimizer = torch.optim.SGD(model.parameters() if params is None else params, lr=0.1)
        return train.attach(model, optimizer, procedures).__enter__()

    with pytest.raises(ValueError, match="MLP without a rosa layer"):
        entered(MLP(), train.RoSASchedule())
    with pytest.raises(ValueError, match=r"density is 0 everywhere.*lora_only"):
        entered(adapted(density=0.0), train.RoSASchedule())
    model = adapted()
    with pytest.raises(ValueError, match=r"values of 'up' are not in the optimiser.*build_optimizer"):
        entered(model, train.RoSASchedule(), params=[m.A for m in sites(model).values()])
    with pytest.raises(RuntimeError, match="has a schedule already"):
        entered(model, train.RoSASchedule(), train.RoSASchedule())
    with pytest.raises(RuntimeError, match="has no mask"):  # a runner that failed to start leaves no schedule behind
        model(batches(1)[0][0])
    with_masks(model.up)
    with pytest.raises(ValueError, match="down of 2 layers have no mask"):
        entered(model, train.RoSASchedule())


def test_a_schedule_that_ended_or_was_copied_no_longer_counts():
    model, x = adapted(), batches(1)[0][0]
    _, runner = fitted(model, train.RoSASchedule())
    with pytest.raises(KeyError), runner:
        model(x)
        twin = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="has no mask"):
            twin(x)
        raise KeyError
    with pytest.raises(RuntimeError, match="has no mask"):
        model(x)


# --- folders, mask files, resuming


@pytest.mark.parametrize("masks", [True, False])
def test_save_and_load(masks, tmp_path):
    """Loading a folder switches the sparse part on if it holds a mask, into a plain model and into an adapted one."""
    model, x = MLP(), rand(5, 16)
    plain, again = copy.deepcopy(model), adapted(copy.deepcopy(model))
    adapted(model)
    perturb(with_masks(model) if masks else model).eval()
    want = model(x)
    fastpeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.up.adapter.rosa.index"].dtype == torch.int32
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ROSA"
    for other in (plain, again):
        fastpeft.load_adapter(other, tmp_path)
        assert all(m.masked == masks for m in sites(other).values())
        assert torch.equal(other.eval()(x), want)
    if masks:
        plain.train()(x).sum().backward()
        assert plain.up.adapter.rosa.values.grad is not None


def test_a_state_dict_switches_the_sparse_part_on():
    model, other, x = perturb(with_masks(adapted())), adapted(), rand(5, 16)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    twin = copy.deepcopy(model)
    assert twin.up.adapter.rosa.masked and torch.equal(twin(x), model(x))


def test_a_start_on_the_meta_device():
    model, x = perturb(with_masks(adapted())), rand(5, 16)
    with torch.device("meta"):
        empty = MLP()
    adapted(empty)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(x), model(x))


@pytest.mark.parametrize("damage", ["outside", "repeated", "negative"])
def test_a_damaged_index_is_refused(damage, tmp_path):
    model, plain = perturb(with_masks(adapted())), MLP()
    fastpeft.save_adapter(model, tmp_path)
    train.save_masks(model, tmp_path / "masks")

    def spoil(path, key):
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        index = tensors[key]
        index[:, 3] = {"outside": torch.tensor([2, 99]), "repeated": index[:, 2], "negative": torch.tensor([-1, -1])}[damage]
        save_file(tensors, path, header)

    spoil(tmp_path / "adapter_model.safetensors", "base_model.model.down.adapter.rosa.index")
    with pytest.raises(fastpeft.CheckpointError, match=r"down.adapter.rosa.*row-major order"):
        fastpeft.load_adapter(plain, tmp_path)
    assert type(plain.up) is nn.Linear
    spoil(tmp_path / "masks", "down.index")
    other = adapted()
    with pytest.raises(fastpeft.CheckpointError, match=r"down.index.*row-major order"):
        train.load_masks(other, tmp_path / "masks")
    assert not any(m.masked or (m.index != -1).any() for m in sites(other).values())


def test_unload_after_training_is_bit_identical():
    for apply in ("copy", "window", "exact"):
        model = MLP()
        before = copy.deepcopy(model.state_dict())
        adapted(model, apply=apply)
        optimizer, runner = fitted(model, train.RoSASchedule("wl1", 2))
        with runner:
            steps(model, optimizer, runner, batches(6))
        assert model.up.adapter.rosa.values.any()
        fastpeft.unload(model)
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


def test_the_published_recipe(tmp_path):
    """Run 1 (wl2, two gradients) ends with masks; run 2 starts from the base model with both parts from step 0."""
    base = MLP()
    first = adapted(copy.deepcopy(base))
    optimizer, runner = fitted(first, train.RoSASchedule("wl2", 2, after="save"))
    taken = 0
    with runner:
        for micros in batches(9):
            steps(first, optimizer, runner, [micros])
            taken += 1
            if runner.done:
                break
        train.save_masks(first, tmp_path / "run1" / "masks.safetensors")
        with pytest.raises(RuntimeError, match=r"after='save' ends the run here.*save_masks"):
            first(batches(1)[0][0])
    assert taken == 4 and not first.up.adapter.rosa.values.any()

    second = adapted(copy.deepcopy(base))
    train.load_masks(second, tmp_path / "run1" / "masks.safetensors")
    for name, m in sites(second).items():
        assert m.masked and torch.equal(m.index, sites(first)[name].index) and not m.values.any() and not m.B.any()
    assert torch.equal(second(batches(1)[0][0]), base(batches(1)[0][0]))
    for schedule in ("wl64", "default"):
        got = observed(copy.deepcopy(second), schedule, 3)
        assert got == [BOTH] * 3
    optimizer = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad])  # no schedule is needed
    second(batches(1)[0][0]).square().sum().backward()
    optimizer.step()
    assert second.up.adapter.rosa.values.all() and second.down.adapter.rosa.values.all()


def test_mask_files_that_do_not_fit(tmp_path):
    file = tmp_path / "masks"
    with pytest.raises(ValueError, match="save_masks: up, down of 2 layers have no mask yet"):
        train.save_masks(adapted(), file)
    assert not file.exists()
    model = with_masks(adapted())
    train.save_masks(model, file)
    assert [p.name for p in tmp_path.iterdir()] == ["masks"]
    for other, error, words in (
        (MLP(), ValueError, "MLP has no rosa layer with a sparse part"),
        (adapted(density=0.1), fastpeft.CheckpointError, r"(up|down).index.*\(2, 102\), needed torch.int32 \(2, 51\); adapt with the density"),
        (adapted(target_modules=["up"]), fastpeft.CheckpointError, r"not in the model: \['down.index'\]"),
        (perturb(with_masks(adapted())), ValueError, "values of (up|down).index are not zero"),
    ):
        with pytest.raises(error, match=words):
            train.load_masks(other, file)
        assert isinstance(other.up, fastpeft.AdaptedLinear) or error is ValueError
    with pytest.raises(FileNotFoundError, match="nothing"):
        train.load_masks(adapted(), tmp_path / "nothing")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(fastpeft.CheckpointError, match="truncated or damaged"):
        train.load_masks(adapted(), file)
    fastpeft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(fastpeft.CheckpointError, match="holds no masks"):
        train.load_masks(adapted(), tmp_path / "adapter" / "adapter_model.safetensors")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file, model = tmp_path / "masks", with_masks(adapted(), 1)
    train.save_masks(model, file)
    before = file.read_bytes()

    def fail(path, data):
        path.write_bytes(data[:10])
        raise OSError("disk full")

    monkeypatch.setattr("fastpeft.folder.sync_write", fail)
    with pytest.raises(OSError, match="disk full"):
        train.save_masks(with_masks(model, 2), file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["masks"]


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 7])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(cut, tmp_path):
    """wl2 with three gradients, cut in the warm-up, while collecting, and after; all parameters equal bit for bit."""
    base, data = MLP(), batches(9, accumulation=2)

    def begun():
        torch.manual_seed(1)
        model = adapted(copy.deepcopy(base))
        return model, *fitted(model, train.RoSASchedule("wl2", 3), accumulation=2)

    whole, optimizer, runner = begun()
    with runner:
        steps(whole, optimizer, runner, data)
    model, optimizer, runner = begun()
    with runner:
        steps(model, optimizer, runner, data[:cut])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "runner": runner.state_dict()}
        torch.save(state, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed, optimizer, runner = begun()
    perturb(resumed)
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    runner.load_state_dict(state["runner"])
    with runner:
        steps(resumed, optimizer, runner, data[cut:])
    for (n, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), n
    assert whole.up.adapter.rosa.values.any()


def test_states_that_do_not_fit():
    model = adapted()
    optimizer, runner = fitted(model, train.RoSASchedule("wl1", 2))
    with runner:
        steps(model, optimizer, runner, batches(2))
        state = runner.state_dict()
        steps(model, optimizer, runner, batches(1))
        later = runner.state_dict()
    other = fitted(adapted(), train.RoSASchedule("wl1", 3))[1]
    with pytest.raises(ValueError, match=r"another schedule.*'grads': \(2, 3\)"):
        other.load_state_dict(state)
    model = adapted(target_modules=["up"])
    optimizer, runner = fitted(model, train.RoSASchedule("wl1", 2))
    runner.load_state_dict(state)
    with runner, pytest.raises(ValueError, match="scores of other layers than the model: down"):
        steps(model, optimizer, runner, batches(1))
    model = adapted()
    optimizer, runner = fitted(model, train.RoSASchedule("wl1", 2))
    runner.load_state_dict(later)
    with runner, pytest.raises(RuntimeError, match=r"step 3 of 'wl1' needs masks.*read its adapter"):
        steps(model, optimizer, runner, batches(1))


def test_a_compiled_model_goes_through_a_schedule():
    plain = adapted()
    twin = copy.deepcopy(plain)
    for model in (plain, torch.compile(twin, backend="aot_eager")):
        optimizer, runner = fitted(model, train.RoSASchedule("wl1", 2))
        with runner:
            steps(model, optimizer, runner, batches(5))
    for name, m in sites(plain).items():
        assert torch.equal(m.index, sites(twin)[name].index)
        assert_fp64(sites(twin)[name].values.detach(), m.values.detach(), name)


def test_nothing_is_said_in_an_ordinary_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observed(adapted(), "wl1", 3)
