"""AdaLoRA against stock PEFT's: start, output, gradients, penalty, scores and masks of real steps, folders in both directions."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand, seed_after
from safetensors.torch import load_file, save_file
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.checkpoint import CheckpointError
from fastpeft.job.arms import copy_start, peft_config, peft_counterpart
from fastpeft.method.adalora import importance
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
import peft
from peft_layers import LEADS, Mask, assert_exports, moved
from test_peft_io import IDS, OWN_NOTICE, bert, gpt2, logits, shaken

IN, OUT, RANK, ALPHA = 13, 11, 4, 5.0
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def built(**options):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="adalora", **(dict(rank=RANK, alpha=ALPHA, dtype=DT) | options)))
    return layer, layer.adapter.adalora


def peft_adalora(layer, rank, alpha, mask=None):
    """Stock PEFT's layer over this one's weight and bias; its factors are at their start."""
    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=DT)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    config = peft.AdaLoraConfig(init_r=rank, target_r=1, lora_alpha=alpha, total_step=10, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0].to(DT)
    if mask is not None:
        theirs.lora_dropout["default"] = Mask(mask)
    return theirs.train()


def factors(theirs):
    """PEFT's A, B and E."""
    return theirs.lora_A["default"], theirs.lora_B["default"], theirs.lora_E["default"]


def set_factors(theirs, *values):
    with torch.no_grad():
        for p, value in zip(factors(theirs), values, strict=True):
            p.copy_(value)
    return theirs


def assert_equals_adalora(layer, theirs, own, through, lead):
    """Outputs, and gradients in x and own; through(dA, dB, dE) carries PEFT's gradients to own."""
    x = rand(*lead, IN)
    seed_after(31)
    y, z = layer(x), theirs(x)
    assert (z - theirs.base_layer(x)).abs().max() > 0.1, "the adapter does nothing"
    assert_fp64(y, z, "y")
    d = torch.randn_like(y)
    dx, *dF = torch.autograd.grad(z, (x, *factors(theirs)), d)
    for i, (g, w) in enumerate(zip(torch.autograd.grad(y, (x, *own), d), (dx, *through(*dF)), strict=True)):
        assert w.abs().max() > 1e-3, f"gradient {i} vanishes, so this shows nothing"
        assert_fp64(g, w, f"gradient {i}")


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"dropout": 0.3}, {"bias": False}, {"alpha": 0.0}, {"alpha": -2.0}], ids=str)
def test_equals_peft(options, lead):
    layer, m = built(**options)
    mask = None
    if "dropout" in options:
        mask = fastpeft.dropout_mask(seed_after(31), (*lead, IN), 0.3)
    theirs = peft_adalora(layer, options.get("rank", RANK), options.get("alpha", ALPHA), mask)
    set_factors(theirs, m.A, m.B, m.E)
    assert_equals_adalora(layer, theirs, (m.A, m.B, m.E), lambda *g: g, lead)


def test_equals_the_formula():
    layer, m = built()
    x, own = rand(2, 5, IN), (m.A, m.B, m.E)
    got, want = layer(x), papers.gated(x, layer.weight, layer.bias, m.A, m.B, m.E, ALPHA / (RANK + 1e-5))
    named = dict(zip("xABE", (x, *own), strict=True))
    compare(got, want, named, named)


def test_starts_as_peft_does_and_counts():
    layer = fastpeft.AdaptedLinear(300, 200, method="adalora", rank=40, alpha=8, dtype=DT)
    m, theirs = layer.adapter.adalora, peft_adalora(layer, 40, 8)
    assert m.scale == theirs.scaling["default"] / (40 + 1e-5)
    assert not m.E.any() and not any(delta_weight(t).any() for t in m.terms(None))
    for ours, other in zip((m.A, m.B, m.E), factors(theirs), strict=True):
        assert ours.shape == other.shape and abs(ours.std() - other.std()) < 1e-3
    assert sum(p.numel() for p in m.parameters()) == 40 * (300 + 200 + 1)


# ---- penalty, score, mask


def test_the_penalty_is_pefts():
    """PEFT adds weight / (2 N) times the sum over N layers to the loss of a Transformers model."""
    losses, batch = {}, {"input_ids": IDS, "labels": torch.tensor([0, 2])}
    model = bert().double()
    fastpeft.adapt(model, "adalora", rank=3, target_modules=["query", "value"])
    layers = [m for n, m in perturb(model).named_modules() if n.endswith("adalora")]
    for weight in (0.0, 0.7):
        config = peft.AdaLoraConfig(init_r=3, target_r=1, total_step=10, target_modules=["query", "value"], orth_reg_weight=weight)
        theirs = peft.get_peft_model(bert().double(), config, autocast_adapter_dtype=False)
        copy_start(model, theirs, "adalora")
        losses[weight] = theirs.base_model(**batch).loss  # PeftModel itself goes past the penalty without a task_type
    want = (losses[0.7] - losses[0.0]) / 0.7 * 2 * len(layers)
    # the difference of two losses of about 5 carries their rounding, over 0.7 and times 8
    assert_fp64(sum(m.orthogonality() for m in layers), want)
    assert want > 1


def test_the_penalty_and_its_gradient():
    _, m = built()
    value = m.orthogonality()
    gaps = [(F @ F.T - torch.eye(RANK, dtype=DT)) for F in (m.A, m.B.T)]
    norms = [sum(g**2 for g in gap.flatten()).sqrt() for gap in gaps]
    assert_fp64(value, norms[0] + norms[1])
    dA, dB = torch.autograd.grad(value, (m.A, m.B))
    assert_fp64(dA, 2 * gaps[0] @ m.A / norms[0])
    assert_fp64(dB, 2 * m.B @ gaps[1] / norms[1])


def test_the_penalty_at_zero_has_a_zero_gradient():
    _, m = built()
    with torch.no_grad():
        m.A.copy_(torch.eye(RANK, IN))
        m.B.copy_(torch.eye(OUT, RANK))
    value = m.orthogonality()
    value.backward()
    assert value == 0 and torch.equal(m.A.grad, torch.zeros_like(m.A)) and torch.equal(m.B.grad, torch.zeros_like(m.B))


def test_the_penalty_is_fp32_under_autocast():
    _, m = built(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = m.orthogonality()
    assert value.dtype is torch.float32 and torch.equal(value, m.orthogonality())


def test_importance_is_the_papers():
    shapes = {"A": (RANK, IN), "E": (RANK, 1), "B": (OUT, RANK)}
    ipt, unc = ({n: torch.rand(s, dtype=DT) for n, s in shapes.items()} for _ in range(2))
    assert_fp64(importance(ipt, unc), papers.triplet_scores(ipt, unc))


def test_scores_and_masks_of_six_steps_equal_pefts():
    """SGD on both sides, PEFT's allocator beside ours: scores of the last step, and the mask that they give."""
    ours, x, want = MLP(), rand(6, 16, grad=False), rand(6, 16, grad=False)
    config = peft.AdaLoraConfig(init_r=3, target_r=1, lora_alpha=6, total_step=20, tinit=2, target_modules=["up", "down"])
    theirs = peft.get_peft_model(copy.deepcopy(ours), config, autocast_adapter_dtype=False)
    for n, p in theirs.named_parameters():
        if "ranknum" in n:  # on a base that is not fp32 on the CPU PEFT 0.21.2 lets it train, and the scale with it
            p.requires_grad_(False)
    fastpeft.adapt(ours, "adalora", rank=3, alpha=6)
    copy_start(perturb(ours), theirs, "adalora")
    layers = {name: ours.get_submodule(name).adapter.adalora for name in ("up", "down")}
    theirs_E = {name: factors(theirs.base_model.model.get_submodule(name))[2] for name in layers}
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (ours, theirs)]
    ema, seen, kth = {}, [], torch.kthvalue
    for step in (0, 1, 2, 3, 4, 15):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            (model(x) - want).square().sum().backward()
            optimizer.step()
        for name, m in layers.items():
            for leaf, p in m.named_parameters():
                now = (p * p.grad).abs().detach()
                ipt, unc = ema.get((name, leaf), (0.0, 0.0))
                ipt = 0.85 * ipt + 0.15 * now
                ema[name, leaf] = ipt, 0.85 * unc + 0.15 * (now - ipt).abs()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "kthvalue", lambda scores, k: seen.append((scores, k)) or kth(scores, k))
            theirs.base_model.update_and_allocate(step)
        if step != 15:
            for name, m in layers.items():
                m.mask(theirs_E[name][:, 0] != 0)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert len(seen) == 3, "PEFT masks after tinit"
    scores, k = seen[-1]
    mine = {name: importance(*({leaf: ema[name, leaf][i] for leaf in "AEB"} for i in (0, 1))) for name in layers}
    ours_all = torch.cat(list(mine.values()))
    assert_fp64(ours_all, scores, "scores")
    assert scores.min() > 0 and 1 < k < 6
    for name, m in layers.items():
        m.mask(mine[name] > ours_all.sort().values[k - 1])
        assert_fp64(m.E, theirs_E[name], name)
    assert sum(int((m.E == 0).sum()) for m in layers.values()) == k
    assert_fp64(ours(x), theirs(x))


def test_mask_is_in_place_and_a_masked_rank_revives():
    layer, m = built()
    E, before = m.E, m.E.detach().clone()
    keep = torch.tensor([True, False, True, False])
    m.mask(keep)
    assert m.E is E and torch.equal(E[:, 0] != 0, keep) and torch.equal(E[keep], before[keep])
    layer(rand(9, IN)).square().sum().backward()
    assert (E.grad != 0).all() and not m.A.grad[1].any() and not m.B.grad[:, 1].any()
    torch.optim.SGD([E], lr=0.1).step()
    assert (E != 0).all(), "the gradient revives a masked rank, so it has to be masked again"
    m.mask(keep)
    assert torch.equal(E[:, 0] != 0, keep)


@pytest.mark.parametrize("keep", [torch.ones(RANK), torch.ones(RANK - 1, dtype=torch.bool), torch.ones(RANK, 1, dtype=torch.bool)], ids=str)
def test_mask_refuses_what_is_no_mask(keep):
    with pytest.raises(ValueError, match=r"adalora.mask: keep is .*it must be torch.bool \(4,\)"):
        built()[1].mask(keep)


@pytest.mark.parametrize("kept", [[], [1], [0, 1, 2, 3]], ids=str)
def test_merge_and_export_drop_masked_ranks(kept, tmp_path):
    """Down to none in one layer."""
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "adalora", rank=RANK, alpha=ALPHA)
    m = perturb(model).eval().up.adapter.adalora
    m.mask(torch.tensor([i in kept for i in range(RANK)]))
    (term,) = m.static_terms(Plain(model.up.weight))
    assert term.A.shape[0] == term.B.shape[1] == len(kept)
    assert_fp64(delta_weight(term, DT), delta_weight(m.terms(None)[0], DT))
    assert_exports(model, plain, tmp_path, x, max(1, len(kept)), RANK)


# ---- folders

CASES = {
    "plain": (bert, ["query", "value"], {}, {}),
    "all_linear": (bert, "all-linear", {"modules_to_save": ["classifier"]}, {"task_type": "SEQ_CLS"}),
    "bias": (bert, ["query"], {"bias": "lora_only"}, {"bias": "lora_only"}),
    "conv1d": (gpt2, ["c_attn"], {}, {"fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
}


def theirs_of(case, **fields):
    build, targets, _, own = CASES[case]
    config = peft.AdaLoraConfig(**(dict(init_r=4, target_r=2, lora_alpha=6, total_step=50, tinit=3, deltaT=2, target_modules=targets)
                                   | own | fields))  # fmt: skip
    return config, peft.get_peft_model(build(), config)


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OWN_NOTICE, FutureWarning)
        yield


@pytest.mark.parametrize("case", CASES)
def test_our_folder_loads_in_peft_without_a_warning(case, tmp_path):
    build, targets, own, _ = CASES[case]
    model = build()
    fastpeft.adapt(model, "adalora", rank=4, alpha=6, target_modules=targets, **own)
    shaken(model)
    first = next(m for n, m in model.named_modules() if n.endswith("adalora"))
    first.mask(torch.tensor([True, False, True, False]))
    want = logits(model)
    assert (want - logits(build())).abs().max() > 1e-3
    fastpeft.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["peft_type"] == "ADALORA" and not written.keys() - theirs_of(case)[0].to_dict().keys()
    with no_warning():
        loaded = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    again = build()
    fastpeft.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), want)


@pytest.mark.parametrize("case", CASES)
def test_their_folder_loads_here(case, tmp_path):
    build = CASES[case][0]
    other = shaken(theirs_of(case)[1])
    want = logits(other)
    other.save_pretrained(tmp_path)
    model = build()
    fastpeft.load_adapter(model, tmp_path)
    assert (want - logits(build())).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def pruned(tmp_path):
    """A folder of stock PEFT after its own masking, one layer without a single rank left; (its model's logits, its pattern)."""
    config, other = theirs_of("plain")
    shaken(other)
    with torch.no_grad():  # no gradient reaches this layer's score, so its ranks are the first to go
        for n, p in other.named_parameters():
            if "0.attention.self.query.lora_" in n:
                p.zero_()
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    for step in (10, 20, 47, 50):
        other(input_ids=IDS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        other.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    other.save_pretrained(tmp_path)
    return other, config.rank_pattern


def test_a_folder_that_peft_pruned_loads_here(tmp_path):
    other, pattern = pruned(tmp_path / "theirs")
    ranks = {n: sum(keep) for n, keep in pattern.items()}
    assert 0 in ranks.values() and len(set(ranks.values())) > 1 and sum(ranks.values()) <= 2 * 4
    stored = load_file(tmp_path / "theirs" / WEIGHTS)
    assert sorted(t.shape[0] for k, t in stored.items() if k.endswith("lora_A")) == sorted(ranks.values())
    want, model = logits(other), bert()
    fastpeft.load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert (want - logits(bert())).abs().max() > 1e-3
    for name, keep in pattern.items():
        E = model.get_submodule(name.partition(".lora_E")[0].removeprefix("base_model.model.")).adapter.adalora.E
        assert (E[:, 0] != 0).tolist() == keep and E.shape == (4, 1)
    fastpeft.save_adapter(model, tmp_path / "ours")
    with no_warning():
        loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours")
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    fastpeft.load_adapter(model, tmp_path / "theirs")
    fastpeft.export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(bert(), tmp_path / "lora")), want, rtol=1e-5, atol=1e-5)


def damaged(kind, config, tensors):
    name = next(n for n, keep in config["rank_pattern"].items() if sum(keep) not in (0, len(keep)))
    keep, key = config["rank_pattern"][name], next(k for k in tensors if k.endswith(name))
    if kind == "short":
        config["rank_pattern"][name] = keep[:-1]
    elif kind == "more":
        config["rank_pattern"][name] = [True, *[False] * (len(keep) - 1)] if sum(keep) != 1 else [False] * len(keep)
    elif kind == "stranger":
        config["rank_pattern"]["bert.nowhere.lora_E"] = keep
    elif kind == "list":
        config["rank_pattern"] = [keep]
    elif kind == "lost":
        del tensors[key.replace("lora_E", "lora_B")]
    elif kind == "none":
        config["rank_pattern"] = None


@pytest.mark.parametrize(("kind", "words"), [
    ("short", "rank_pattern has 3 entries.*init_r = 4"), ("more", "rank_pattern keeps"), ("stranger", "nowhere.*needed"),
    ("list", "load_adapter"), ("lost", "lora_B"), ("none", "lora_A is"),
])  # fmt: skip
def test_a_pattern_that_does_not_fit_its_file_changes_nothing(kind, words, tmp_path):
    pruned(tmp_path)
    config, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    damaged(kind, config, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = bert()
    want = logits(model)
    with pytest.raises(CheckpointError, match=words):
        fastpeft.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), want) and not any("adapter" in n for n, _ in model.named_modules())


def test_ranks_of_their_own_are_fastpefts_folder(tmp_path):
    """PEFT's AdaLoRA has one init_r, by which every scale divides."""
    model, plain = bert(), bert()
    fastpeft.adapt(model, "adalora", rank=4, target_modules=["query"], rank_pattern={"1.attention.self.query": 3})
    want = logits(shaken(model))
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["library"] == "fastpeft"
    fastpeft.load_adapter(plain, tmp_path)
    assert torch.equal(logits(plain), want)


def test_adapt_takes_a_peft_config():
    config, other = theirs_of("plain", use_rslora=True, lora_dropout=0.25)
    model = bert()
    report = fastpeft.adapt(model, copy.deepcopy(config))
    layers = [n.removeprefix("base_model.model.") for n, m in other.named_modules() if hasattr(m, "lora_E") and len(m.lora_E)]
    assert sorted(report.adapted) == sorted(layers)
    m = model.get_submodule(layers[0]).adapter.adalora
    assert (m.A.shape[0], m.scale, m.dropout) == (4, 6 / (4 + 1e-5), 0.25)


def test_the_jobs_peft_arm_is_this_layer():
    """Same start, same loss: the placeholder schedule adds no penalty."""
    assert peft_counterpart("adalora")
    model = bert()
    fastpeft.adapt(model, "adalora", rank=4, target_modules=["query"])
    theirs = peft.get_peft_model(bert(), peft_config("adalora", {"rank": 4}, ["query"], []))
    copy_start(shaken(model), theirs, "adalora")
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
    torch.testing.assert_close(model(**batch).loss, theirs.base_model.eval()(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(rank=0), ValueError, r"adalora: rank=0 at 'linear'.*1 to 11"),
    (dict(), ValueError, r"adalora: rank=12.*1 to 11"),
    (dict(rank=2, alpha=float("nan")), ValueError, r"adalora: alpha=nan.*finite"),
    (dict(rank=2, dropout=1), ValueError, r"adalora: dropout=1"),
])  # fmt: skip
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "adalora", **options)
