"""LoTR: the dense formula, stock PEFT of L M and R, the Tucker-2 form of a group, its starts, counts and limits."""

from __future__ import annotations

import copy
import json

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.method.lotr import tucker2
from fastpeft.terms import delta_weight

IN, OUT, RANK, ALPHA = 14, 10, 3, 1.7
LAYERS = ("a", "b", "c")


class Beside(nn.Module):
    """Three layers of one shape that are called by name."""

    def __init__(self):
        super().__init__()
        for n in LAYERS:
            self.add_module(n, nn.Linear(IN, OUT, dtype=DT))

    def __getitem__(self, name):
        return self.get_submodule(name)


def stack(**options):
    model = Beside()
    report = fastpeft.adapt(model, "lotr", **({"rank": RANK, "alpha": ALPHA} | options))
    return model, report


def own(model, name="a"):
    return model[name].adapter.lotr


def update(model, name):
    (term,) = own(model, name).terms(Plain(model[name].weight))
    return delta_weight(term, DT).detach()


def test_layers_of_a_group_equal_the_dense_formula():
    model, _ = stack()
    perturb(model)
    holder, x, W = own(model).holder, rand(4, 5, IN), {n: model[n].weight for n in LAYERS}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(parameters) == {f"{n}.adapter.lotr.M" for n in LAYERS} | {f"adapter_shared.lotr_{OUT}x{IN}_rank{RANK}.{p}" for p in "LR"}
    got = torch.cat([model[n](x) for n in LAYERS], -1)
    want = torch.cat(
        [papers.lotr(x, W[n], model[n].bias, holder.L, own(model, n).M, holder.R, ALPHA / RANK) for n in LAYERS], -1
    )
    assert_fp64(got, want, "y")
    d = torch.randn_like(got)
    for name, g, w in zip(
        ("x", *parameters),
        *(torch.autograd.grad(y, (x, *parameters.values()), d) for y in (got, want)),
        strict=True,
    ):
        assert w.abs().max() > 1e-3, name
        assert_fp64(g, w, name)


@pytest.mark.parametrize("lead", [(9,), (3, 5)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_peft_lora_of_its_factors(lead, dropout):
    pytest.importorskip("peft")
    from peft_layers import assert_equals_peft, moved

    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="lotr", dtype=DT, rank=RANK, alpha=ALPHA, dropout=dropout))
    m = layer.adapter.lotr
    assert_equals_peft(layer, lambda: (m.holder.R, m.holder.L @ m.M), ALPHA, lead, dropout)


def test_start_is_the_base_and_only_cores_move_first():
    model, _ = stack()
    holder, x = own(model).holder, rand(200, IN)
    for n in LAYERS:
        assert torch.equal(model[n](x), nn.functional.linear(x, model[n].weight, model[n].bias))
        assert not update(model, n).any()
    sum(model[n](x).square().sum() for n in LAYERS).backward()
    assert not holder.L.grad.any() and not holder.R.grad.any()
    assert all(own(model, n).M.grad.abs().max() > 0 for n in LAYERS)


def test_normal_factors_have_unit_deviation():
    layer = fastpeft.AdaptedLinear(2000, 1000, method="lotr", rank=4)
    for p in (layer.adapter.lotr.holder.L, layer.adapter.lotr.holder.R):
        # the deviation of n normal numbers is off by 1 / sqrt(2 n); six of those
        assert abs(p.std().item() - 1) < 6 / (2 * p.numel()) ** 0.5 and abs(p.mean().item()) < 6 / p.numel() ** 0.5


def test_ranks_of_layers_and_of_the_unfolded_stack():
    model, _ = stack()
    perturb(model)
    updates = [update(model, n) for n in LAYERS]
    for matrix in (*updates, torch.cat(updates, 1), torch.cat(updates, 0)):
        assert torch.linalg.matrix_rank(matrix) == RANK
    assert torch.linalg.matrix_rank(torch.stack([u.flatten() for u in updates])) == len(LAYERS)


def test_published_count_on_roberta_base():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.RobertaModel(transformers.RobertaConfig(), add_pooling_layer=False)
    report = fastpeft.adapt(model, "lotr", rank=2, target_modules=["query", "value"])
    assert len(report.adapted) == 24 and report.trainable == 3168
    assert report.shared == {"adapter_shared.lotr_768x768_rank2": (24, 2 * (768 + 768))}
    assert {r.trainable for r in report.layers.values()} == {4}


def test_storage_is_shared_within_a_shape_and_a_rank():
    model = MLP()
    model.again, model.other = nn.Linear(16, 32, dtype=DT), nn.Linear(16, 32, dtype=DT)
    report = fastpeft.adapt(model, "lotr", rank=3, rank_pattern={"other": 2}, alpha_pattern={"again": 5})
    assert {k: n for k, (n, _) in report.shared.items()} == {
        "adapter_shared.lotr_32x16_rank3": 2, "adapter_shared.lotr_16x32_rank3": 1, "adapter_shared.lotr_32x16_rank2": 1,
    }  # fmt: skip
    holders = {n: model.get_submodule(n).adapter.lotr.holder for n in ("up", "down", "again", "other")}
    assert holders["up"] is holders["again"] and holders["up"].L.data_ptr() == holders["again"].L.data_ptr()
    assert len({id(h) for h in holders.values()}) == 3
    assert (model.up.adapter.lotr.scale, model.again.adapter.lotr.scale, model.other.adapter.lotr.scale) == (1 / 3, 5 / 3, 1 / 2)


def test_svd_starts_are_the_singular_vectors_of_the_unfoldings():
    torch.manual_seed(2)
    model = Beside()
    weights = {n: model[n].weight.detach().clone() for n in LAYERS}
    fastpeft.adapt(model, "lotr", rank=RANK, left="svd", middle="svd", right="svd", alpha=RANK)
    holder = own(model).holder
    U = torch.linalg.svd(torch.cat(list(weights.values()), 1)).U[:, :RANK]
    V = torch.linalg.svd(torch.cat(list(weights.values()), 0)).Vh[:RANK]
    # singular vectors have no sign of their own: the projectors are compared
    assert_fp64((holder.L @ holder.L.T).detach(), U @ U.T, "left")
    assert_fp64((holder.R.T @ holder.R).detach(), V.T @ V, "right")
    for n in LAYERS:
        assert_fp64(update(model, n), U @ U.T @ weights[n] @ V.T @ V, f"update of {n}")
    assert not holder.cores, "a core was not taken"


@pytest.mark.parametrize(
    "starts",
    [
        dict(left="svd", right="svd"),
        dict(left="normal", right="svd"),
        dict(left="zeros", middle="identity"),
        dict(left="svd", middle="identity", right="zeros"),
        dict(left="zeros", middle="svd", right="svd"),
    ],
    ids=str,
)
def test_starts_with_one_zero_are_identities_that_can_move(starts):
    model, _ = stack(**starts)
    x = rand(6, IN)
    for n in LAYERS:
        assert torch.equal(model[n](x), nn.functional.linear(x, model[n].weight, model[n].bias))
        if starts.get("middle") == "identity":
            assert torch.equal(own(model, n).M, torch.eye(RANK, dtype=DT))
    sum(model[n](x).square().sum() for n in LAYERS).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_checkpoint_is_loaded_without_decomposing_weights(tmp_path, monkeypatch):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "lotr", rank=3, left="svd", middle="svd", right="svd")
    want = perturb(model)(x)
    fastpeft.save_adapter(model, tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a decomposition was made")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    fastpeft.load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), want)
    with torch.device("meta"):
        empty = MLP()
    fastpeft.adapt(empty, "lotr", rank=3, left="svd", middle="svd", right="svd")
    with pytest.raises(AssertionError, match="decomposition"):
        fastpeft.adapt(MLP(), "lotr", rank=3, left="svd")


def test_tucker2_of_a_low_rank_stack_is_exact():
    L, R = torch.randn(OUT, 2, dtype=DT), torch.randn(2, IN, dtype=DT)
    weights = [L @ torch.randn(2, 2, dtype=DT) @ R for _ in range(3)]
    U, V = tucker2([Plain(W) for W in weights], 2)
    for W in weights:
        assert_fp64(U @ (U.T @ W @ V.T) @ V, W)


def test_factors_are_composed_in_full_precision_under_autocast():
    layer = fastpeft.AdaptedLinear(IN, OUT, method="lotr", rank=RANK)
    perturb(layer)
    m = layer.adapter.lotr
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (term,) = m.terms(Plain(layer.weight))
    assert torch.equal(term.B, m.holder.L @ m.M)


def test_export_is_lora_of_the_same_rank(tmp_path):
    pytest.importorskip("peft")
    from peft_layers import peft_logits

    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "lotr", rank=4, alpha=3)
    want = perturb(model).eval()(x)
    fastpeft.export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert_fp64(peft_logits(plain, tmp_path, x), want)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(rank=0), ValueError, r"lotr: rank=0 at 'linear'.*1 to 10"),
        (dict(rank=11), ValueError, r"rank=11.*smaller side"),
        (dict(rank=2.0), TypeError, r"rank=2.0"),
        (dict(left="svdd"), ValueError, r"left='svdd'.*normal, zeros, svd"),
        (dict(middle="normal"), ValueError, r"middle='normal'.*zeros, identity, svd"),
        (dict(left="zeros"), ValueError, r"two of them start at zero"),
        (dict(left="zeros", right="zeros", middle="svd"), ValueError, r"two of them start at zero"),
        (dict(alpha=float("nan")), ValueError, r"alpha=nan.*finite"),
        (dict(dropout=1.0), ValueError, r"dropout=1.0"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "lotr", **options)
