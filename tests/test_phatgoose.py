"""PHATGOOSE beside its formula: gate training, routing, what the gates of a folder belong to, experts that do not fit."""

from __future__ import annotations

import copy
import json
import shutil

import papers
import pytest
import torch
from checks import DT, MLP, compare, perturb, rand, seed_after
from tolerance import assert_as_good, assert_fp64

import fastpeft
from fastpeft.folder import CONFIG, GATES, WEIGHTS, pending_path
from fastpeft.method.phatgoose import standardised, weights
from fastpeft.stack import Experts

pytest.importorskip("peft")
from experts_folders import peft_factors, peft_lora
from peft_layers import moved, peft_logits

IN, OUT, S = 12, 10, 0.7


def gate_layer(rank=3, **options):
    own = Experts(("a",), (rank,), S)
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="phatgoose", experts=own, stage="gate", **({"dtype": DT} | options)))
    return layer, layer.adapter.phatgoose


def routed_layer(ranks, k=2, **options):
    own = Experts(tuple("abcdefg"[: len(ranks)]), ranks, S, fresh=True)
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="phatgoose", experts=own, k=k, dtype=DT, **options))
    return layer, layer.adapter.phatgoose


def split(m):
    """(A, B, s) of the experts that a layer has."""
    spans = [m.experts.span(z) for z in m.experts.present]
    return [(m.A[span], m.B[:, span], m.experts.scale) for span in spans]


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A plain MLP; folders a, b, c of PEFT LoRAs of other ranks, scales and layers; a_gated, ... with gates; the PEFT models."""
    torch.manual_seed(0)
    tmp_path, plain, theirs = tmp_path_factory.mktemp("experts"), MLP(), {}
    configs = {
        "a": dict(targets=["up", "down"]),
        "b": dict(targets=["up"], rank=4, use_rslora=True),
        "c": dict(targets=["up", "down"], rank=2, rank_pattern={"up": 5}, alpha_pattern={"down": 9}),
    }
    for name, config in configs.items():
        theirs[name] = peft_lora(plain, tmp_path / name, **config)
        model = copy.deepcopy(plain)
        fastpeft.adapt(model, "phatgoose", experts=[tmp_path / name], stage="gate")
        fastpeft.save_adapter(perturb(model), tmp_path / f"{name}_gated")
    return plain, tmp_path, theirs


# stage 2


@pytest.mark.parametrize("lead", [(7,), (2, 5)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gate_training_in_fp64(dropout, lead):
    layer, m = gate_layer(dropout=dropout)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["adapter.phatgoose.V"]
    x = rand(*lead, IN)
    mask = fastpeft.dropout_mask(seed_after(5), x.shape, dropout) if dropout else None
    y = layer(x)
    want = papers.phatgoose_gate(x, layer.weight, layer.bias, m.A, m.B, m.V[0], S, mask)
    compare(y, want, {"v": m.V, "x": x}, {"v": m.V, "x": x})


def test_a_gate_begins_at_half_of_the_lora(gated):
    plain, folder, theirs = gated
    model, x = copy.deepcopy(plain), rand(5, 16)
    fastpeft.adapt(model, "phatgoose", experts=[folder / "a"], stage="gate")
    A, B, s = peft_factors(theirs["a"], "up")
    assert not model.up.adapter.phatgoose.V.any()
    assert_fp64(model.up(x), papers.lora(x, plain.up.weight, plain.up.bias, A, B, s / 2))


def test_gate_training_on_a_bf16_base():
    layer, m = gate_layer(dtype=torch.bfloat16)
    x, d = torch.randn(64, IN, dtype=torch.bfloat16), torch.randn(64, OUT, dtype=torch.bfloat16)
    seen = []
    for kind in ("ours", "exact", "plain"):
        dt = torch.float64 if kind == "exact" else torch.bfloat16
        leaf = x.to(dt).requires_grad_()
        own = [t.to(dt) for t in (layer.weight, layer.bias, m.A, m.B)]
        y = layer(leaf) if kind == "ours" else papers.phatgoose_gate(leaf, *own, m.V[0].to(dt), S)
        dx, dv = torch.autograd.grad(y, (leaf, m.V), d.to(y.dtype))
        seen.append({"y": y, "x": dx, "v": dv})
    for name, got in seen[0].items():
        assert_as_good(got, seen[1][name].double(), seen[2][name], name)


def test_gate_training_compiles():
    layer, _ = gate_layer()
    x = rand(5, IN)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    own = {"v": layer.adapter.phatgoose.V, "x": x}
    compare(compiled(x), layer(x), own, own)


# stage 3


@pytest.mark.parametrize("k", [1, 2, 4, 9])
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 4, 1, 3)], ids=str)
def test_routing_token_by_token_in_fp64(ranks, k):
    layer, m = routed_layer(ranks, k)
    x = rand(2, 5, IN)
    want = papers.phatgoose(x, layer.weight, layer.bias, split(m), m.V, min(k, 4))
    own = {"A": m.A, "B": m.B, "x": x} | ({"V": m.V} if k > 1 else {})  # one expert's weight is 1 whatever its score
    compare(layer(x), want, own, own)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 2, 2)], ids=str)
def test_leading_dimensions(lead):
    layer, m = routed_layer((2, 4, 1))
    x = rand(*lead, IN)
    want = papers.phatgoose(x, layer.weight, layer.bias, split(m), m.V, 2) if x.numel() else x.new_empty(*lead, OUT)
    assert_fp64(layer(x), want)


def test_routing_on_a_bf16_base():
    """Among all experts, so that no rounding can choose another one; x has a mean, which the folded layer norm must cancel."""
    layer, m = routed_layer((2, 4, 1), 3)
    layer = layer.to(torch.bfloat16)
    m.float()
    x = (torch.randn(64, IN) + 1).to(torch.bfloat16)
    d = torch.randn(64, OUT, dtype=torch.bfloat16)
    own, seen = {"A": m.A, "B": m.B, "V": m.V}, []
    for kind in ("ours", "exact", "plain"):
        dt = torch.float64 if kind == "exact" else torch.bfloat16
        leaf, (W, b, V) = x.to(dt).requires_grad_(), (t.to(dt) for t in (layer.weight, layer.bias, m.V))
        parts = [(A.to(dt), B.to(dt), s) for A, B, s in split(m)]
        y = layer(leaf) if kind == "ours" else papers.phatgoose(leaf, W, b, parts, V, 3)
        seen.append({"y": y} | dict(zip(("x", *own), torch.autograd.grad(y, (leaf, *own.values()), d.to(y.dtype)), strict=True)))
    for name, got in seen[0].items():
        assert_as_good(got, seen[1][name].double(), seen[2][name], name)


def test_what_the_layer_lacks_is_not_chosen_there():
    layer, m = routed_layer((2, 0, 3, 1))
    assert m.experts.present == (0, 2, 3) and m.V.shape == (3, IN) and m.A.shape == (6, IN)
    x = rand(20, IN)
    assert_fp64(layer(x), papers.phatgoose(x, layer.weight, layer.bias, split(m), m.V, 2))


def routing(x, V, k):
    return weights(torch.nn.functional.linear(x, standardised(V)), x, k)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_have_k_entries_that_add_up_to_one(k):
    x, V = rand(50, IN, grad=False), rand(5, IN, grad=False)
    w = routing(x, V, k)
    assert torch.equal((w > 0).sum(-1), torch.full((50,), k)) and not (w < 0).any()
    assert_fp64(w.sum(-1), torch.ones(50, dtype=DT))
    assert len(set(w.argmax(-1).tolist())) > 1, "all tokens go the same way, so this shows little"
    theirs = torch.stack([papers.phatgoose_code_weights(t, V, k) for t in x])
    # their sum + 1e-6 in the denominator: at most 1e-6 over the smallest sum of k of 5 weights, which is above k / 5
    assert (w - theirs).abs().max() <= 1e-6 * 5 / k and (w - theirs).abs().max() > 0


def test_routing_ignores_scale_and_shift_of_x():
    """x is so large that the layer norm's eps is below fp64's rounding; with it the weights would move by eps / variance."""
    x, V = 1e5 * rand(50, IN, grad=False), rand(5, IN, grad=False)
    want = routing(x, V, 2)
    for c, d in ((1.0, 3e5), (7.0, -2e5), (0.5, 1e5)):
        assert_fp64(routing(c * x + d, V, 2), want)
    assert (routing(-x, V, 2) - want).abs().max() > 0.1


def test_two_of_two_is_the_whole_softmax():
    x, V = rand(9, IN, grad=False), rand(2, IN, grad=False)
    norm = lambda t: torch.nn.functional.layer_norm(t, (IN,))  # noqa: E731
    assert_fp64(routing(x, V, 2), (norm(x) @ norm(V).T / IN**0.5).softmax(-1))


def test_an_untrained_gate_scores_zero_and_can_be_chosen():
    x, V = rand(200, IN, grad=False), rand(3, IN, grad=False)
    V[1] = 0
    w = routing(x, V, 2)
    chosen = w[:, 1] > 0
    assert 0 < chosen.sum() < 200
    partner = (norm_scores(x, V)[chosen]).amax(-1)
    assert_fp64(w[chosen, 1], 1 / (1 + partner.exp()))


def norm_scores(x, V):
    """Scores of every gate but number 1, which stands at -inf."""
    norm = lambda t: torch.nn.functional.layer_norm(t, (IN,))  # noqa: E731
    scores = norm(x) @ norm(V).T / IN**0.5
    scores[:, 1] = -torch.inf
    return scores


@pytest.mark.parametrize("k", [1, 2])
def test_experts_of_folders_with_other_ranks_scales_and_layers(gated, k):
    plain, folder, theirs = gated
    model, x = copy.deepcopy(plain), rand(9, 16, grad=False)
    report = fastpeft.adapt(model, "phatgoose", experts={n: folder / f"{n}_gated" for n in "abc"}, k=k)
    assert report.trainable == 0 and [n.partition(":")[0] for n in report.notes] == [
        "expert 'b' has 1 of the layers not (down, ...)", "nothing trains"
    ]  # fmt: skip
    y = x
    for site in ("up", "down"):
        layer = plain.get_submodule(site)
        names = [n for n in "abc" if peft_factors(theirs[n], site)]
        gates = [gate_in(folder / f"{n}_gated", site) for n in names]
        y = papers.phatgoose(y, layer.weight, layer.bias, [peft_factors(theirs[n], site) for n in names], gates, k)
        y = torch.tanh(y) if site == "up" else y
    assert_fp64(model.eval()(x), y)
    assert torch.equal(model.train()(x), model.eval()(x))
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad.any() and all(p.grad is None for p in model.parameters())


def gate_in(folder, site):
    from safetensors.torch import load_file

    return load_file(folder / GATES)[f"base_model.model.{site}.gate"][0]


@pytest.mark.parametrize("kind", ["a", "a_gated"])
def test_a_single_expert_is_that_lora(gated, kind, tmp_path):
    plain, folder, _ = gated
    model, x = copy.deepcopy(plain), rand(5, 16)
    fastpeft.adapt(model, "phatgoose", experts=[folder / kind])
    lora = copy.deepcopy(plain)
    fastpeft.load_adapter(lora, folder / "a")
    want = lora.eval()(x)
    assert torch.equal(model.eval()(x), want)
    fastpeft.export_lora(model, tmp_path / "out")
    assert_fp64(peft_logits(plain, tmp_path / "out", x), want)
    assert_fp64(fastpeft.merge(model)(x), want)


# folders


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_gated_folder_is_the_lora_and_its_gates(gated, name, tmp_path):
    plain, folder, _ = gated
    x = rand(5, 16)
    assert torch.equal(*(peft_logits(plain, folder / f, x) for f in (name, f"{name}_gated"))), "stock PEFT sees the LoRA"
    model, again = copy.deepcopy(plain), copy.deepcopy(plain)
    fastpeft.load_adapter(model, folder / f"{name}_gated")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"V"}
    fastpeft.adapt(again, "phatgoose", experts={name: folder / f"{name}_gated"}, stage="gate")
    assert model.up.adapter.phatgoose.V.any() and torch.equal(model(x), again(x)), "gate training goes on from the gates"
    fastpeft.save_adapter(perturb(again), tmp_path / "further")
    fastpeft.load_adapter(model, tmp_path / "further")
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("names", ["abc", "ab", "a"])
def test_experts_of_a_mixture_are_exported_and_mixed_again(gated, names, tmp_path):
    """Each folded into its B, where scales differ; one scale, where they do not (a at `down`)."""
    plain, folder, theirs = gated
    model, again, x = copy.deepcopy(plain), copy.deepcopy(plain), rand(9, 16, grad=False)
    fastpeft.adapt(model, "phatgoose", experts={n: folder / f"{n}_gated" for n in names})
    for n in names:
        fastpeft.export_expert(model, tmp_path / f"{n}_out", n)
        assert_fp64(peft_logits(plain, tmp_path / f"{n}_out", x), theirs[n](x))
    fastpeft.adapt(again, "phatgoose", experts={n: tmp_path / f"{n}_out" for n in names})
    assert torch.equal(again(x), model(x))
    fastpeft.save_adapter(model, tmp_path / "mixture")
    loaded = copy.deepcopy(plain)
    fastpeft.load_adapter(loaded, tmp_path / "mixture")
    assert torch.equal(loaded(x), model(x)) and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match=f"no expert is named 'd'; there are {', '.join(names)}"):
        fastpeft.export_expert(model, tmp_path / "d_out", "d")
    assert not (tmp_path / "d_out").exists()


def test_gates_of_other_weights_are_refused(gated, tmp_path):
    plain, folder, _ = gated
    mixed = shutil.copytree(folder / "c_gated", tmp_path / "mixed")
    shutil.copy(folder / "b_gated" / GATES, mixed / GATES)
    model = copy.deepcopy(plain)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fastpeft.CheckpointError, match=r"expert 'c': .*trained for other weights"):
        fastpeft.adapt(model, "phatgoose", experts={"a": folder / "a_gated", "c": mixed})
    with pytest.raises(fastpeft.CheckpointError, match="trained for other weights"):
        fastpeft.load_adapter(model, mixed)
    assert_untouched(model, before)


def test_a_lora_saved_over_a_gated_expert_leaves_no_gates(gated, tmp_path):
    plain, folder, _ = gated
    again = shutil.copytree(folder / "c_gated", tmp_path / "again")
    model = copy.deepcopy(plain)
    fastpeft.load_adapter(model, folder / "c")
    fastpeft.save_adapter(perturb(model), again)
    assert sorted(p.name for p in again.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    fastpeft.adapt(copy.deepcopy(plain), "phatgoose", experts=[again], stage="gate")


def test_a_save_that_stops_between_its_renames_keeps_weights_and_gates_together(gated, tmp_path, monkeypatch):
    """At every rename: the folder holds the old expert with its gates, or the new one with its own."""
    plain, folder, _ = gated
    import fastpeft.folder as module

    def values(at):
        model = copy.deepcopy(plain)
        fastpeft.load_adapter(model, at)
        return model.state_dict()

    (expert,) = fastpeft.experts.read_experts(plain, [folder / "c_gated"])
    assert set(expert.gates) == {"up", "down"}
    old, new = values(folder / "a_gated"), values(folder / "c_gated")
    replace = module.os.replace
    for stop in range(3):
        at = tmp_path / f"stopped{stop}"
        shutil.copytree(folder / "a_gated", at)
        seen = []

        def broken(source, target, stop=stop, seen=seen):
            if len(seen) == stop:
                raise OSError("disk")
            seen.append(target)
            replace(source, target)

        model = copy.deepcopy(plain)
        fastpeft.load_adapter(model, folder / "c_gated")
        monkeypatch.setattr(module.os, "replace", broken)
        with pytest.raises(OSError, match="disk"):
            fastpeft.save_adapter(model, at)
        monkeypatch.setattr(module.os, "replace", replace)
        got, want = values(at), new if stop else old
        assert list(got) == list(want) and all(torch.equal(got[k], want[k]) for k in want), stop
        fastpeft.save_adapter(model, at)
        got = values(at)
        assert all(torch.equal(got[k], new[k]) for k in new) and not pending_path(at, GATES).exists()


# what does not fit


def assert_untouched(model, before):
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.requires_grad for p in model.parameters())


def edited(source, folder, change=None, **config):
    """A copy of a folder that stock PEFT wrote, with other config fields, or other tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    if config:
        (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    if change:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


A_UP = "base_model.model.up.lora_A.weight"
BROKEN = {
    "missing": (dict(change=lambda t: {k: v for k, v in t.items() if k != A_UP}), r"1 missing: .*up.lora_A"),
    "unexpected": (dict(change=lambda t: t | {"more": t[A_UP].clone()}), r"1 unexpected: more"),
    "shape": (dict(change=lambda t: t | {A_UP: t[A_UP][:2].clone()}), r"up.lora_A.weight is \(2, 16\), needed \(3, 16\)"),
    "nan": (dict(change=lambda t: t | {A_UP: t[A_UP] * float("nan")}), r"NaN or Inf: .*up.lora_A"),
    "dora": (dict(use_dora=True), r"no place for \{'use_dora': True\}"),
    "head": (dict(modules_to_save=["down"]), r"no place for \{'modules_to_save': \['down'\]\}"),
    "bias": (dict(bias="all"), r"no place for \{'bias': 'all'\}"),
    "kind": (dict(peft_type="LOHA"), r"peft_type is 'LOHA'; train it as a LoRA"),
    "targets": (dict(target_modules=["elsewhere"]), r"matches no layer of MLP"),
    "rank": (dict(r=0), r"gives 'up' the rank 0"),
}


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_folder_that_is_no_expert_of_this_model(gated, what, tmp_path):
    plain, folder, _ = gated
    edit, words = BROKEN[what]
    bad = edited(folder / "a", tmp_path / "bad", **edit)
    model = copy.deepcopy(plain)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fastpeft.CheckpointError, match=rf"adapt: expert 'bad': .*{words}"):
        fastpeft.adapt(model, "phatgoose", experts=[folder / "a_gated", bad])
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("experts", "options", "error", "words"),
    [
        (["a", "a_gated"], {}, ValueError, r"folders of a hold no gates; train them with experts=\[folder\], stage='gate'"),
        (["a_gated", "a_gated"], {}, ValueError, r"several experts are named a_gated"),
        (["nowhere"], {}, FileNotFoundError, r"expert 'nowhere': .*does not exist"),
        ([], {}, ValueError, r"give at least one folder"),
        (["a", "b"], dict(stage="gate"), ValueError, r"gate of one trained LoRA"),
        (2, dict(stage="gate"), ValueError, r"gate of one trained LoRA"),
        (["a"], dict(stage="gate", bias="all"), ValueError, r"trains gates only"),
        (["a"], dict(rank=4), ValueError, r"rank beside experts="),
        (["a"], dict(target_modules=["up"]), ValueError, r"target_modules beside experts="),
        (["a"], dict(stage="train"), ValueError, r"stage='train'; it must be 'route'"),
        (["a_gated"], dict(k=0), ValueError, r"k=0 at 'up'; it must be at least 1"),
        (True, {}, TypeError, r"experts=True"),
        (0, {}, ValueError, r"experts=0 at 'up'; it must be at least 1"),
        (2.5, {}, TypeError, r"experts=2.5; give a list of folders"),
    ],
    ids=str,
)
def test_errors_leave_the_model_as_it_was(gated, experts, options, error, words):
    plain, folder, _ = gated
    model = copy.deepcopy(plain)
    before = copy.deepcopy(model.state_dict())
    experts = [folder / e for e in experts] if isinstance(experts, list) else experts
    with pytest.raises(error, match=words):
        fastpeft.adapt(model, "phatgoose", experts=experts, **options)
    assert_untouched(model, before)


def test_experts_are_for_routed_methods(gated):
    plain, folder, _ = gated
    with pytest.raises(ValueError, match="option 'experts' does not exist for lora"):
        fastpeft.adapt(plain, "lora", experts=[folder / "a"])
