"""adapt, adapters_off, merge and unload on models: which layers, which parameters, and what stays."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import DT, MLP, perturb, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft import AdaptedLinear, uncalled

RULES = [
    {},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["0.self_attn.o_proj"]},
    {"target_modules": r".*layers\.1\..*_proj"},
    {"target_modules": r"model\.layers\.\d\.mlp\.(up|down)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj", "0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    {"target_modules": ["q_proj", "lm_head"]},
]


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_targets_as_in_peft(rules, llama):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**{"target_modules": "all-linear", **rules}))
    want = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    report = fastpeft.adapt(llama, "lora", rank=2, **rules)
    assert set(report.adapted) == want
    assert {n for n, m in llama.named_modules() if isinstance(m, AdaptedLinear)} == want


def test_patterns_as_in_peft(llama):
    peft = pytest.importorskip("peft")
    ranks, alphas = {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5, "1.self_attn.v_proj": 4}, {"self_attn.q_proj": 9, "down_proj": 1}
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", rank_pattern=ranks, alpha_pattern=alphas)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config)
    fastpeft.adapt(llama, "lora", rank=2, alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    seen = set()
    for n, m in theirs.named_modules():
        if isinstance(m, peft.tuners.lora.LoraLayer):
            own = llama.get_submodule(n.removeprefix("base_model.model.")).adapter.lora
            assert (own.A.shape[0], own.scale) == (m.r["default"], m.scaling["default"]), n
            seen.add((own.A.shape[0], own.scale))
    assert {(3, 3.0), (5, 1.6), (4, 2.0), (2, 0.5), (2, 4.0)} == seen


def test_report_counts_and_names_the_head(llama):
    report = fastpeft.adapt(llama, "lora", rank=2)
    assert report.trainable == sum(p.numel() for p in llama.parameters() if p.requires_grad)
    assert report.trainable == sum(r.trainable for r in report.layers.values()) > 0
    assert any("lm_head" in n for n in report.notes)
    assert f"{report.trainable:,d}" in str(report) and "q_proj" in str(report)


class Classifier(MLP):
    def __init__(self):
        super().__init__()
        self.score = nn.Linear(16, 3, dtype=DT)

    def forward(self, x):
        return self.score(super().forward(x))


def test_modules_to_save_train_step_aside_and_come_back():
    model, x = Classifier(), rand(5, 16)
    before, want, score = copy.deepcopy(model.state_dict()), model(x), model.score
    report = fastpeft.adapt(model, "lora", rank=2, modules_to_save=["score"])
    assert report.saved_modules == ["score"] and report.adapted == ["up", "down"] and type(model.score) is nn.Linear
    perturb(model)
    model(x).square().sum().backward()
    assert model.score.weight.grad.any() and model.up.weight.grad is None
    trained = model(x)
    with fastpeft.adapters_off(model):
        assert torch.equal(model(x), want)
    assert torch.equal(model(x), trained) and not torch.equal(trained, want)
    fastpeft.unload(model)
    assert same_state(model.state_dict(), before) and model.score is score and torch.equal(model(x), want)


@pytest.mark.parametrize(("mode", "trains"), [("none", set()), ("lora_only", {"up.bias", "down.bias"}),
                                              ("all", {"up.bias", "down.bias", "score.bias"})])  # fmt: skip
def test_bias_modes(mode, trains):
    model, x = Classifier(), rand(5, 16)
    before, want = copy.deepcopy(model.state_dict()), model(x)
    fastpeft.adapt(model, "lora", rank=2, bias=mode, target_modules=["up", "down"])
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".adapter." not in n} == trains
    perturb(model)
    model(x).sum().backward()
    assert all(model.get_parameter(n).grad is not None for n in trains)
    with fastpeft.adapters_off(model):
        assert torch.equal(model(x), want)
    assert not torch.equal(model(x), want)
    fastpeft.unload(model)
    assert same_state(model.state_dict(), before)


def test_adapters_off_nested_and_after_an_error():
    model, x = MLP(), rand(5, 16)
    base = model(x)
    fastpeft.adapt(model, "dora", rank=2)
    perturb(model)
    on = model(x)
    with fastpeft.adapters_off(model):
        with fastpeft.adapters_off(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), on)
    with pytest.raises(KeyError), fastpeft.adapters_off(model):
        raise KeyError
    assert torch.equal(model(x), on)


def test_hooks_are_kept():
    model, seen = MLP(), []
    model.up.register_forward_hook(lambda m, a, y: seen.append("forward"))
    model.up.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    model.up.register_full_backward_hook(lambda m, a, b: seen.append("backward"))
    fastpeft.adapt(model, "lora", rank=2)
    model(rand(2, 16)).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    fastpeft.unload(model)
    model(rand(2, 16))
    assert seen[3:] == ["pre", "forward"]


class Named(nn.Linear):
    extra = 7


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_linear_subclasses():
    model, x = MLP(), rand(3, 16)
    model.up.__class__ = Named
    fastpeft.adapt(model, "lora", rank=2)
    assert isinstance(model.up, Named) and isinstance(model.up, AdaptedLinear) and model.up.extra == 7
    perturb(model)(x).sum().backward()
    fastpeft.unload(model)
    assert type(model.up) is Named

    model.up.__class__ = Doubling
    with pytest.raises(ValueError, match=r"'up'.*Doubling has a forward of its own"):
        fastpeft.adapt(model, "lora", rank=2, target_modules=["up"])
    report = fastpeft.adapt(model, "lora", rank=2)
    assert report.adapted == ["down"] and "Doubling" in report.skipped["up"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_conv1d_adapts_and_merges(method, gpt2):
    model, ids = gpt2.to(DT), torch.tensor([[1, 5, 9]])
    base, layer = model(ids).logits, model.transformer.h[0].attn.c_attn
    cls, shape = type(layer), layer.weight.shape
    fastpeft.adapt(model, method, rank=2, target_modules=["c_attn", "c_fc"])
    assert isinstance(layer, cls) and layer.adapter.get_submodule(method).A.shape == (2, shape[0])
    assert_fp64(model(ids).logits, base)
    perturb(model)
    want = model(ids).logits
    assert not torch.equal(want, base)
    fastpeft.merge(model)
    assert type(layer) is cls and layer.weight.shape == shape
    assert_fp64(model(ids).logits, want)


def test_multihead_attention_is_refused_by_name():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2), "lin": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match=r"mha\.out_proj.*MultiheadAttention"):
        fastpeft.adapt(model, "lora", rank=2, target_modules=["out_proj"])
    report = fastpeft.adapt(model, "lora", rank=2)
    assert report.adapted == ["lin"] and "never calls it" in report.skipped["mha.out_proj"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_fast_path_runs_the_adapter(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval(), torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    attributes = copy.deepcopy([{k: v for k, v in m.__dict__.items() if isinstance(v, (int, bool))} for m in model.modules()])
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    fastpeft.adapt(model, "lora", rank=2)
    perturb(model)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    slow = model(x, src_key_padding_mask=padding)
    keep = ~padding
    assert torch.equal(fast[keep], slow.detach()[keep]), "eval without grad runs something else"
    assert not torch.allclose(fast[keep], base[keep])
    fastpeft.unload(model)
    assert [{k: v for k, v in m.__dict__.items() if isinstance(v, (int, bool))} for m in model.modules()] == attributes


def test_adapted_linear_standalone_and_from_linear():
    layer, x = AdaptedLinear(12, 8, method=["lora", "dora"][1], rank=2, dtype=DT), rand(3, 12)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {f"adapter.dora.{k}" for k in ("A", "B", "m")}
    assert_fp64(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    linear = nn.Linear(12, 8, bias=False, dtype=DT).eval()
    new = AdaptedLinear.from_linear(linear, "lora", rank=3)
    assert new.weight is linear.weight and new.bias is None and not linear.weight.requires_grad and not new.training
    assert type(linear) is nn.Linear and torch.equal(new(x), linear(x))
    assert (new.in_features, new.out_features) == (12, 8) and new.adapter.lora.A.shape == (3, 12)


def test_several_methods_add_up():
    model, x = MLP(), rand(3, 16)
    fastpeft.adapt(model, ["lora", "melora"], rank=2)
    perturb(model)
    both = [copy.deepcopy(model) for _ in range(2)]
    for m, name in zip(both, ("lora", "melora"), strict=True):
        for layer in (m.up, m.down):
            delattr(layer.adapter, name)
    up = model.up(x)
    linear = nn.functional.linear(x, model.up.weight, model.up.bias)
    assert_fp64(up, both[0].up(x) + both[1].up(x) - linear)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant, llama):
    ids = torch.tensor([[3, 4, 5, 6]])
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fastpeft.adapt(llama, "lora", rank=2, dropout=0.2)
    perturb(llama).train()
    runs = []
    for on in (True, False):
        if not on:
            llama.gradient_checkpointing_disable()
        torch.manual_seed(4)
        llama(ids, labels=ids).loss.backward()
        runs.append({n: p.grad for n, p in llama.named_parameters() if p.requires_grad})
        llama.zero_grad()
    assert all(g is not None and torch.equal(g, runs[1][n]) for n, g in runs[0].items())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_falcons_linear_is_one(method):
    """A subclass with a forward of its own that computes nothing else; adapted, accelerated under PEFT, and put back."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True)
    model, ids = transformers.FalconForCausalLM(config).to(DT).eval(), torch.arange(12).view(2, 6)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", use_dora=method == "dora"))
    classes, before = {n: type(m) for n, m in model.named_modules()}, model(ids).logits
    report = fastpeft.adapt(model, method, rank=3)
    assert len(report.adapted) == 2 * 4 and not report.skipped
    assert_fp64(model(ids).logits, before, "start")
    perturb(model)
    changed = model(ids).logits
    assert not torch.allclose(changed, before)
    merged = fastpeft.merge(copy.deepcopy(model))
    assert_fp64(merged(ids).logits, changed, "merged")
    fastpeft.unload(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes and torch.equal(model(ids).logits, before)
    assert len(fastpeft.accelerate(theirs, strict=True).layers) == 2 * 4
    fastpeft.reset_calls()
    theirs(ids)
    assert fastpeft.fused_calls() == {method: 2 * 4}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("version", ["Mamba", "Mamba2"])
def test_a_mixer_that_reads_weights_is_not_fooled(version, kernels, monkeypatch):
    """Mamba's dt_proj is never called, out_proj and x_proj are not where its kernels run: every adapter that is left gets a gradient."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(uncalled, "KERNELS", ("torch",) if kernels else ("no_such_package",))
    own = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if version == "Mamba2" else {}
    config = getattr(transformers, f"{version}Config")(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=8, **own)
    torch.manual_seed(0)
    model, ids = getattr(transformers, f"{version}ForCausalLM")(config), torch.arange(12).view(2, 6)
    with pytest.raises(ValueError, match=r"mixer\.out_proj.*does not call it"):
        fastpeft.adapt(model, "lora", rank=2, target_modules=["out_proj"])
    report = fastpeft.adapt(model, "lora", rank=2)
    left = {n.rpartition(".")[2] for n in report.adapted}
    assert left == ({"in_proj", "x_proj"} if version == "Mamba" and not kernels else {"in_proj"})
    perturb(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad)


def test_owners_that_read_their_weights():
    """WavLM's attention and the convolutions of speaker verification: what is left reaches the loss."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4)}
    more = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 12}
    torch.manual_seed(0)
    model = transformers.WavLMForXVector(transformers.WavLMConfig(**sizes, **more))
    report = fastpeft.adapt(model, "lora", rank=2)
    read = [n for n, why in report.skipped.items() if "does not call it" in why]
    assert not any("no linear layer" in n for n in report.notes), "a weight-normalised convolution is no stack of matrices"
    assert len(read) == 2 * 4 + 2 and {n.rpartition(".")[2] for n in read} == {"q_proj", "k_proj", "v_proj", "out_proj", "kernel"}
    perturb(model)
    model(torch.randn(2, 400), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if p.requires_grad and "objective" not in n)


def test_the_report_says_that_experts_are_left_alone(llama):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40, "num_key_value_heads": 2}
    mixture = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=3))
    (note,) = (n for n in fastpeft.adapt(mixture, "melora").notes if "no linear layer" in n)
    assert note.startswith(f"4 stacks of matrices ({2 * 3 * 3 * 32 * 48:,} numbers") and "experts.gate_up_proj" in note
    assert not any("no linear layer" in n for n in fastpeft.adapt(llama, "melora").notes)


def test_a_class_of_the_users_own_with_one_of_those_names_is_adapted():
    TDNNLayer = type("TDNNLayer", (nn.Module,), {})
    model = nn.Sequential(TDNNLayer())
    model[0].kernel = nn.Linear(8, 8)
    assert fastpeft.adapt(model, "lora", rank=2).adapted == ["0.kernel"]
