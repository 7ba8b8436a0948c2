"""Starts: LoRA's from a seed, against PEFT's, and what happens to a layer whose base weight is replaced, by a start or `quantize`."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from checks import DT, MLP, perturb, rand
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import assert_fp64
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastpeft
from fastpeft.adapter import base_of
from fastpeft.base import Plain
from fastpeft.factored import Factored
from fastpeft.ops import nf4
from fastpeft.quantised import NF4, Int8
from fastpeft.terms import effective_bias, effective_weight

pytest.importorskip("peft")
import peft

# method and options, what the base becomes, and the tensors that a folder holds of it
REPLACED = {
    "loftq": (("loftq", dict(rank=4)), NF4, ["codes", "absmax"]),
    "pissa folded": (("pissa", dict(rank=4, fold=True)), Plain, ["weight"]),
    "qpissa": (("pissa", dict(rank=8, bits=4)), NF4, ["codes", "absmax"]),
    "r-loda": (("loda", dict(rank=4, base="r", base_rank=5)), Factored, ["U", "V"]),
    "s-loda+": (("loda_plus", dict(rank=4, base="s", base_density="2:4")), Plain, ["weight"]),
    "two methods": ((["loftq", "lora"], dict(rank=4)), NF4, ["codes", "absmax"]),
    "quantised": (("lora", dict(rank=4, quantize="nf4")), NF4, []),
    "int8 and a gain": (("dora", dict(rank=4, quantize="int8")), Int8, []),
}
STARTED = [k for k, ((_, options), _, _) in REPLACED.items() if "quantize" not in options]
MERGES = [k for k in REPLACED if "loda" not in k]
every = pytest.mark.parametrize("kind", list(REPLACED))
merges = pytest.mark.parametrize("kind", MERGES)


def adapted(kind, model=None, moved=True, **more):
    model = model or MLP()
    (method, options), _, _ = REPLACED[kind]
    fastpeft.adapt(model, method, **options, **more)
    return perturb(model) if moved else model


# --- LoRA's starts


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("start", ["kaiming", "gaussian", "orthogonal"])
def test_starts_compute_the_base(name, start):
    layer = nn.Linear(24, 20, dtype=DT)
    x = rand(5, 24)
    adapted = fastpeft.AdaptedLinear.from_linear(layer, name, rank=4, start=start)
    want = layer(x)
    assert_fp64(adapted(x), want)
    A, B = (adapted.adapter.get_submodule(name).get_parameter(n) for n in "AB")
    assert A.any() and bool(B.any()) == (start == "orthogonal")


def test_gaussian_has_the_law_of_peft():
    """The same draws under the same seed."""
    layer = fastpeft.AdaptedLinear(300, 200, rank=16, start="gaussian")
    base = nn.Sequential(nn.Linear(300, 200))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=16, init_lora_weights="gaussian", target_modules=["0"]))
    theirs = theirs.base_model.model[0]
    torch.manual_seed(4)
    fastpeft.start.factors.gaussian(layer.adapter.lora.A, layer.adapter.lora.B)
    torch.manual_seed(4)
    theirs.reset_lora_parameters("default", "gaussian")
    assert torch.equal(layer.adapter.lora.A, theirs.lora_A["default"].weight)
    assert torch.equal(layer.adapter.lora.B, theirs.lora_B["default"].weight)


def test_orthogonal_is_that_of_peft():
    layer = fastpeft.AdaptedLinear(30, 20, rank=6, start="orthogonal")
    base = nn.Sequential(nn.Linear(30, 20))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=6, init_lora_weights="orthogonal", target_modules=["0"]))
    theirs = theirs.base_model.model[0]
    torch.manual_seed(4)
    fastpeft.start.factors.orthogonal(layer.adapter.lora.A, layer.adapter.lora.B)
    torch.manual_seed(4)
    theirs.orthogonal_init("default")
    assert torch.equal(layer.adapter.lora.A, theirs.lora_A["default"].weight)
    assert torch.equal(layer.adapter.lora.B, theirs.lora_B["default"].weight)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_starts_of_a_peft_config(start, dora, tmp_path):
    config = peft.LoraConfig(r=4, init_lora_weights=start, use_dora=dora, target_modules=["up", "down"])
    model = MLP()
    x = rand(5, 16)
    want = model(x)
    fastpeft.adapt(model, config)
    assert_fp64(model(x), want)
    name = "dora" if dora else "lora"
    own = model.up.adapter.get_submodule(name)
    assert bool(own.B.any()) == (start == "orthogonal")
    assert start != "gaussian" or 0.1 < own.A.std() < 0.5
    # a folder says where its values are, not where they began: any start takes it
    fastpeft.save_adapter(perturb(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    other = copy.deepcopy(fastpeft.unload(copy.deepcopy(model)))
    fastpeft.adapt(other, name, rank=4, target_modules=["up", "down"])
    fastpeft.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_start_errors(name):
    with pytest.raises(ValueError, match=rf"{name}: start='pissa'.*kaiming, gaussian, orthogonal"):
        fastpeft.AdaptedLinear(8, 8, method=name, rank=4, start="pissa")
    with pytest.raises(ValueError, match=r"even rank.*rank=3"):
        fastpeft.AdaptedLinear(8, 8, method=name, rank=3, start="orthogonal")


# --- a base that was replaced


@every
def test_it_lives_beside_the_methods_and_does_not_train(kind):
    model = adapted(kind)
    _, cls, _ = REPLACED[kind]
    for site in (model.up, model.down):
        assert type(base_of(site)) is cls and "base" not in site.adapter.names
        assert not list(site.adapter.base.parameters())
    assert any(k.startswith("up.adapter.base.") for k in model.state_dict())


@merges
def test_output_is_that_of_the_replacing_weight(kind):
    model, x = adapted(kind).eval(), rand(5, 16)

    def layer(m, x):
        terms = m.adapter.terms(base_of(m))
        return nn.functional.linear(x, effective_weight(base_of(m).dense(DT), terms, DT), effective_bias(m.bias, terms, DT))

    assert_fp64(model(x), layer(model.down, torch.tanh(layer(model.up, x))))


@every
def test_unload_and_adapters_off_give_the_original_back(kind):
    plain, x = MLP(), rand(5, 16)
    want, before = plain(x), copy.deepcopy(plain.state_dict())
    model = adapted(kind, plain)
    adapted_output = model(x)
    assert (adapted_output - want).abs().max() > 1e-3
    with fastpeft.adapters_off(model):
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), adapted_output)
    fastpeft.unload(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(model(x), want)


@every
def test_a_weight_that_was_let_go(kind, tmp_path):
    """keep_base=False: the memory is free, the output the same, and what would need the weight says so."""
    model = MLP()
    fresh = copy.deepcopy(model)
    twin = adapted(kind, copy.deepcopy(model), moved=False)
    ghosts = [StorageWeakRef(m.weight.untyped_storage()) for m in (model.up, model.down)]
    adapted(kind, model, moved=False, keep_base=False)
    gc.collect()
    assert all(g.expired() for g in ghosts) and not any(k in ("up.weight", "down.weight") for k in model.state_dict())
    twin.load_state_dict(model.state_dict(), strict=False)
    x = rand(5, 16)
    assert torch.equal(model(x), twin(x))
    model(x).sum().backward()
    with pytest.raises(ValueError, match=r"unload: 'up'.*keep_base=False"):
        fastpeft.unload(model)
    with fastpeft.adapters_off(model), pytest.raises(RuntimeError, match="keep_base=True"):
        model(x)
    assert torch.equal(model(x), twin(x))
    assert torch.equal(copy.deepcopy(model)(x), twin(x))
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(fresh, tmp_path)
    fastpeft.load_adapter(perturb(model), tmp_path)
    assert torch.equal(fresh(x), twin(x)) and torch.equal(model(x), twin(x))


@merges
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_merge_makes_one_dense_weight(kind, keep, bias):
    model, x = adapted(kind, MLP(bias=bias), keep_base=keep).eval(), rand(5, 16)
    want = model(x)
    fastpeft.merge(model)
    assert type(model.up) is nn.Linear and model.up.weight.shape == (32, 16)
    assert model.up.weight.requires_grad, "as before adapt"
    assert list(model.state_dict()) == list(MLP(bias=bias).state_dict())
    assert_fp64(model(x), want)


@every
def test_save_and_load_without_looking_at_the_weights(kind, tmp_path, monkeypatch):
    """A folder holds what replaced the base, so loading needs no SVD and no quantisation (but for `quantize`, done again)."""
    (_, options), _, leaves = REPLACED[kind]
    plain, x = MLP(), rand(5, 16)
    begun = copy.deepcopy(plain)
    model = adapted(kind, copy.deepcopy(plain)).eval()
    fastpeft.save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sorted(k for k in keys if ".base." in k) == sorted(
        f"base_model.model.{s}.adapter.base.{leaf}" for s in ("up", "down") for leaf in leaves
    )
    adapted(kind, begun)
    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, None)
    monkeypatch.setattr(torch, "svd_lowrank", None)
    if "quantize" not in options:
        monkeypatch.setattr(nf4, "quantise", None)
    for other in (plain, begun):
        fastpeft.load_adapter(other, tmp_path)
        assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize("kind", STARTED)
def test_a_damaged_base_is_refused_and_the_model_stays(kind, tmp_path):
    _, _, leaves = REPLACED[kind]
    plain, x = MLP(), rand(5, 16)
    want = plain(x)
    fastpeft.save_adapter(adapted(kind), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(str(file), framework="pt") as f:
        header = f.metadata()
    tensors = load_file(file)
    key = f"base_model.model.up.adapter.base.{leaves[0]}"
    save_file({k: v for k, v in tensors.items() if k != key}, file, header)
    with pytest.raises(fastpeft.CheckpointError, match="1 missing"):
        fastpeft.load_adapter(plain, tmp_path)
    save_file(tensors | {key: tensors[key][:1].clone()}, file, header)
    with pytest.raises(fastpeft.CheckpointError, match="wrong shape"):
        fastpeft.load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), want) and type(plain.up) is nn.Linear


@merges
def test_export_only_where_the_base_is_one_that_others_have(kind, tmp_path):
    model = adapted(kind)
    if kind == "quantised":
        fastpeft.export_lora(model, tmp_path)
        assert (tmp_path / "adapter_model.safetensors").exists()
        return
    with pytest.raises(ValueError, match="Gain term" if "gain" in kind else "replaced the base weight of 'up'"):
        fastpeft.export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_says_what_exports():
    table = {m.name: m for m in fastpeft.methods()}
    assert table["pissa"].exportable and table["loftq"].mergeable and not table["loftq"].exportable


@every
def test_deepcopy_and_dtypes(kind):
    model, x = adapted(kind).eval(), rand(5, 16)
    want = model(x)
    twin = copy.deepcopy(model)
    perturb(twin)
    assert not torch.equal(twin(x), want) and torch.equal(model(x), want)
    for own, other in zip(model.up.adapter.base.buffers(), twin.up.adapter.base.buffers(), strict=True):
        assert own.data_ptr() != other.data_ptr() and torch.equal(own, other)
    half = copy.deepcopy(model).bfloat16()
    assert base_of(half.up).dtype is torch.bfloat16
    y = half(x.detach().bfloat16())
    # a few roundings of 2^-9 on each of two layers
    assert y.dtype is torch.bfloat16 and (y.double() - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("kind", ["pissa folded", "qpissa", "r-loda"])
def test_compiled_whole(kind):
    """One graph, forward and backward. (loftq and quantised bases: test_methods_in_models.py and test_nf4_base.py.)"""
    (method, options), _, _ = REPLACED[kind]
    layer = fastpeft.AdaptedLinear(16, 16, method=method, dtype=DT, **options)
    perturb(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = [rand(3, 16), *(p for p in layer.parameters() if p.requires_grad)]
    got, want = compiled(leaves[0]), layer(leaves[0])
    assert_fp64(got, want, "y")
    for g, w in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
        assert_fp64(g, w)


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(kind, reentrant):
    model, x = adapted(kind).train(), rand(5, 16)
    own, seen = [p for p in model.parameters() if p.requires_grad], []
    for again in (False, True):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        y.square().sum().backward()
        seen.append([y.detach(), x.grad, *(p.grad for p in own)])
        x.grad = None
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("kind", STARTED)
def test_a_layer_that_stands_alone(kind):
    (method, options), cls, _ = REPLACED[kind]
    linear, x = nn.Linear(16, 32, dtype=DT), rand(5, 16)
    layer = fastpeft.AdaptedLinear.from_linear(linear, method, **options)
    assert type(base_of(layer)) is cls
    perturb(layer)
    # with blank values, as a start on the meta device has them; the state dict brings all
    other = fastpeft.AdaptedLinear(16, 32, method=method, device="meta", dtype=DT, **options).to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@every
def test_conv1d(kind, gpt2):
    """A layer that stores its weight [in, out]."""
    tokens = torch.tensor([[5, 9, 2, 33]])
    model = gpt2.to(DT).eval()
    want = model(tokens).logits
    adapted(kind, model, keep_base=False)
    model.eval()
    moved = model(tokens).logits
    assert moved.isfinite().all() and not torch.equal(moved, want)
    if kind in MERGES:
        fastpeft.merge(model)
        assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 96)
        assert_fp64(model(tokens).logits, moved)


def test_a_16_bit_base_stays_one():
    for kind, (_, cls, _) in REPLACED.items():
        model = adapted(kind, MLP(torch.bfloat16)) if kind != "pissa folded" else None
        if model is None:
            with pytest.warns(UserWarning, match="rounds W"):
                model = adapted(kind, MLP(torch.bfloat16))
        base = base_of(model.up)
        assert type(base) is cls and base.dtype is torch.bfloat16
        assert model(torch.randn(3, 16, dtype=torch.bfloat16)).dtype is torch.bfloat16
        assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lora", dict(keep_base=False), "keep_base=False, but lora replaces no base"),
        ("pissa", dict(keep_base=False), "keep_base=False, but pissa replaces no base"),
        ("loftq", dict(quantize="nf4"), r"loftq replaces the base weight of 'up', and so does quantize='nf4'"),
        (["loftq", "loda"], dict(base="s", base_density=0.5), r"loda replaces .* and so does another method"),
        (["loftq", "dora"], dict(), r"a gain at 'up' starts at the norm of its weight"),
        (["loftq", "random_masking"], dict(overlay=True), "overlay=True at 'up', whose base weight is replaced"),
        ("random_masking", dict(overlay=True, quantize="nf4"), "overlay=True at 'up', whose base weight is replaced"),
        ("lora", dict(quantize="nf9"), "quantize='nf9' does not exist"),
    ],
    ids=str,
)
def test_refusals_leave_the_model_alone(method, options, words):
    model, x = MLP(), rand(5, 16)
    want = model(x)
    with pytest.raises(ValueError, match=words):
        fastpeft.adapt(model, method, **({} if method == "random_masking" else {"rank": 4}), **options)
    assert torch.equal(model(x), want) and type(model.up) is nn.Linear


def test_a_shared_weight_is_not_let_go():
    model = MLP()
    model.twin = nn.Linear(16, 32, dtype=DT)
    model.twin.weight = model.up.weight
    with pytest.raises(ValueError, match=r"keep_base=False at 'up', whose weight 'twin' shares"):
        fastpeft.adapt(model, "loftq", rank=4, target_modules=["up"], keep_base=False)
    fastpeft.adapt(model, "loftq", rank=4, target_modules=["up", "down"])
    x = rand(5, 16)
    assert torch.equal(model.twin(x), nn.functional.linear(x, model.up.weight, model.twin.bias))
