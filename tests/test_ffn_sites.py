"""Which FFNs carry an adapter, in which models, and that its hooks leave nothing behind."""

from __future__ import annotations

import copy
import gc
import types
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from checks import DT, MLP, perturb, rand
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.ffn import NAMES

IDS = torch.tensor([[3, 5, 9, 2, 33, 7], [8, 8, 1, 40, 4, 12]])
SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=False))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    no = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=1,
            **no,
        )
    )


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    return OPTForCausalLM(OPTConfig(**sizes, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=64, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0))


MODELS = {
    "llama": (llama, "model.layers.{}.mlp", None),
    "gpt2": (gpt2, "transformer.h.{}.mlp", None),
    "bert": (bert, "bert.encoder.layer.{}", ("intermediate.dense", "output.dense")),
    "opt": (opt, "model.decoder.layers.{}", ("fc1", "fc2")),
}
every = pytest.mark.parametrize("kind", MODELS)


def made(kind):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return MODELS[kind][0]().to(DT).eval()


def sites(kind):
    return [MODELS[kind][1].format(k) for k in range(2)]


def logits(model):
    return model(input_ids=IDS).logits


def own(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def clean(model):
    """Nothing of an adapter is left: hooks, submodules, attributes."""
    for m in model.modules():
        assert not m._forward_hooks and not m._forward_pre_hooks and not m._forward_hooks_with_kwargs
        assert "adapter" not in m._modules and not any("fastpeft" in k for k in m.__dict__)
    return True


def by_hand(model, kind, leaves):
    """The unadapted model with the formula written into its forwards: dense Kronecker products of `leaves`, by site."""

    def beside(site, x):
        A, B, s = (leaves[f"{site}.adapter.krona_b_res.{k}"] for k in ("A", "B", "s_res"))
        return x @ torch.kron(A, B) + s * x

    for site in sites(kind):
        pair = MODELS[kind][2]
        first, last = (model.get_submodule(f"{site}.{n}" if pair else site) for n in pair or ("", ""))
        seen = []

        def start(x, real=first.forward, seen=seen):
            seen.append(x)
            return real(x)

        def end(x, real=last.forward, seen=seen, site=site, same=first is last):
            return real(x) + beside(site, x if same else seen.pop())

        if first is not last:
            first.forward = start
        last.forward = end
    return model


@every
def test_in_models_the_formula_with_every_gradient(kind):
    model = made(kind)
    reference, base = copy.deepcopy(model).requires_grad_(False), logits(model).detach()
    report = fastpeft.adapt(model, "krona_b_res", res_init=0.0)
    assert report.adapted == sites(kind) and not report.skipped
    assert list(own(model)) == [
        f"{s}.adapter.krona_b_res.{k}" for s in sites(kind) for k in ("A", "B", "s_res")
    ]
    assert all("ffn 16 -> 16" in r.shape and r.trainable == 33 for r in report.layers.values())
    assert torch.equal(logits(model), base)
    perturb(model)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in own(model).items()}
    got, want = logits(model), logits(by_hand(reference, kind, leaves))
    assert_fp64(got, want, "logits")
    assert not torch.equal(got, base)
    d = torch.randn_like(want)
    found = torch.autograd.grad(got, list(own(model).values()), d)
    for name, g, w in zip(leaves, found, torch.autograd.grad(want, list(leaves.values()), d), strict=True):
        assert_fp64(g, w, name)


def test_t5_has_its_ffns_in_both_stacks():
    pytest.importorskip("transformers")
    model = t5().to(DT).eval()
    report = fastpeft.adapt(model, "krona_b")
    assert report.adapted == [
        "encoder.block.0.layer.1.DenseReluDense",
        "decoder.block.0.layer.2.DenseReluDense",
    ]
    perturb(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for p in own(model).values())


@every
def test_off_and_unload_are_exact(kind):
    model = made(kind)
    before, want = copy.deepcopy(model.state_dict()), logits(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    fastpeft.adapt(model, "krona_b_res")
    perturb(model)
    on = logits(model)
    with torch.no_grad(), fastpeft.adapters_off(model):
        assert torch.equal(logits(model), want)
    on.square().sum().backward()
    assert all(p.grad.any() for p in own(model).values())
    assert torch.equal(logits(model), on)
    assert fastpeft.unload(model) is model and clean(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(logits(model), want)
    fastpeft.adapt(model, "krona_b")


@every
def test_a_deepcopy_is_independent(kind):
    model = made(kind)
    base = logits(model)
    fastpeft.adapt(model, "krona_b")
    perturb(model)
    want, twin = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(twin), want)
    perturb(twin)
    moved = logits(twin)
    assert torch.equal(logits(model), want) and not torch.equal(moved, want)
    fastpeft.unload(model)
    assert torch.equal(logits(model), base) and torch.equal(logits(twin), moved)
    fastpeft.unload(twin)
    assert clean(twin) and torch.equal(logits(twin), base)


@every
def test_save_and_load(kind, tmp_path):
    model, fresh = made(kind), made(kind)
    fastpeft.adapt(model, "krona_b", shape=(2, 8), scale=0.5)
    perturb(model)
    fastpeft.save_adapter(model, tmp_path)
    report = fastpeft.load_adapter(fresh, tmp_path)
    assert report.adapted == sites(kind) and torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
@every
def test_checkpointing_of_transformers(kind, reentrant):
    model, runs = made(kind), []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fastpeft.adapt(model, "krona_b_res")
    perturb(model).train()
    for on in (True, False):
        if not on:
            model.gradient_checkpointing_disable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        runs.append({n: p.grad for n, p in own(model).items()})
        model.zero_grad()
        assert all(getattr(m, "taken", None) is None for m in model.modules()), (
            "an input is held after the step"
        )
    assert all(g is not None and torch.equal(g, runs[1][n]) for n, g in runs[0].items())


class Pair(nn.Module):
    """OPT's form: a list of blocks with two linears outside attention."""

    def __init__(self, depth=2):
        super().__init__()
        block = lambda: nn.ModuleDict(  # noqa: E731
            {
                "self_attn": nn.Linear(16, 16, dtype=DT),
                "fc1": nn.Linear(16, 32, dtype=DT),
                "fc2": nn.Linear(32, 16, dtype=DT),
            }
        )
        self.blocks = nn.ModuleList([block() for _ in range(depth)])

    def forward(self, x):
        for b in self.blocks:
            x = b["self_attn"](x)
            x = x + b["fc2"](torch.tanh(b["fc1"](x)))
        return x


@pytest.mark.parametrize("method", ["krona_b", "krona_b_res"])
def test_a_pair_compiles_whole(method):
    model, graphs = Pair(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fastpeft.adapt(model, method)
    perturb(model)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for rows in (3, 5, 7, 11):
        x = rand(rows, 16)
        got, want = compiled(x), model(x)
        assert_fp64(got, want)
        leaves = [*own(model).values(), x]
        for g, w in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
            assert_fp64(g, w)
    assert graphs.frame_count <= 2, f"{graphs.frame_count} graphs for four batch sizes"
    with torch.no_grad():
        assert_fp64(compiled(x), model(x), "no_grad")
        with fastpeft.adapters_off(model):
            assert_fp64(compiled(x), model(x), "off")
    assert all(getattr(m, "taken", None) is None for m in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_stops_early_holds_nothing(reentrant):
    """Recompute ends inside the adapter's own product where that is the last to save; x may not stay behind."""
    model = Pair(1)
    fastpeft.adapt(model, "krona_b")
    perturb(model)
    x = rand(4, 16)
    want = torch.autograd.grad(model(x).square().sum(), [*own(model).values(), x])
    kept = recomputed()  # of other tests, which are not asked here; held, so that no id comes back
    others = {id(t) for t in kept}
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()
    for w, p in zip(want, [*own(model).values(), x], strict=True):
        assert torch.equal(p.grad, w)
    assert model.blocks[0].adapter.taken is None
    del y, w
    assert not [t for t in recomputed() if id(t) not in others], "a recomputed input is held"


def recomputed():
    """What is alive and could be a recomputed input of [4, 16]."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    return [t for t in tensors if t.shape == (4, 16) and t.grad_fn is not None]


def test_an_input_that_is_a_parameter_does_not_become_one_of_ours():
    model, x = Pair(1), nn.Parameter(torch.randn(3, 16, dtype=DT))
    model.blocks[0]["self_attn"] = nn.Identity()
    fastpeft.adapt(model, "krona_b")
    names = list(model.state_dict())
    model(x).sum().backward()
    assert list(model.state_dict()) == names and x.grad is not None


Out = namedtuple("Out", ["hidden", "router"])


class Odd(nn.Module):
    """An FFN that is called by keyword and gives more than its output."""

    def __init__(self, wrap):
        super().__init__()
        self.feed_forward, self.wrap = MLP(), wrap
        real = self.feed_forward.forward
        self.feed_forward.forward = lambda hidden_states: wrap(real(hidden_states))

    def forward(self, x):
        return self.feed_forward(hidden_states=x)


def test_keywords_and_tuples():
    for wrap in (lambda y: y, lambda y: (y, "router"), lambda y: Out(y, "router")):
        model, x = Odd(wrap), rand(2, 3, 16)
        before = model(x)
        fastpeft.adapt(model, "krona_b")
        perturb(model)
        m = model.feed_forward.adapter.krona_b
        after = model(x)
        assert type(after) is type(before)
        if isinstance(after, tuple):
            assert after[1] == before[1] == "router" and len(after) == 2
            before, after = before[0], after[0]
        assert_fp64(after, before + x @ torch.kron(m.A, m.B))


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda y: {"y": y}, TypeError, "'feed_forward' was called with Tensor and gave dict"),
        (lambda y: (), TypeError, "empty tuple"),
        (lambda y: y[..., :3], ValueError, r"\(2, 16\) and gave \(2, 3\)"),
        (lambda y: y[None], ValueError, r"\(2, 16\) and gave \(1, 2, 16\)"),
    ],
)
def test_an_output_that_does_not_fit_is_named(wrap, error, message):
    model = Odd(wrap)
    fastpeft.adapt(model, "krona_b")
    with pytest.raises(error, match=f"krona_b.*{message}"):
        model(rand(2, 16))


def test_a_pair_whose_first_linear_did_not_run_is_named():
    model = Pair(1)
    fastpeft.adapt(model, "krona_b")
    with pytest.raises(RuntimeError, match=r"krona_b.*'blocks\.0'.*without its first"):
        model.blocks[0]["fc2"](rand(2, 32))


def test_users_hooks_see_the_sum_and_stay():
    for model, inside in ((nn.ModuleDict({"mlp": MLP()}), "mlp"), (Pair(1), "blocks.0.fc2")):
        seen, last = [], model.get_submodule(inside)
        last.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y))
        last.register_forward_pre_hook(lambda m, args, seen=seen: seen.append("pre"))
        fastpeft.adapt(model, "krona_b_res")
        perturb(model)
        x = rand(3, 16)
        y = (
            model["mlp"](x)
            if inside == "mlp"
            else model.blocks[0]["fc2"](torch.tanh(model.blocks[0]["fc1"](x)))
        )
        assert seen[0] == "pre" and torch.equal(seen[1], y)
        fastpeft.unload(model)
        assert len(last._forward_hooks) == len(last._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["llama", "bert", "opt"])
def test_with_a_method_on_linears(kind, tmp_path):
    model, fresh = made(kind), made(kind)
    before, base = copy.deepcopy(model.state_dict()), logits(model)
    report = fastpeft.adapt(model, ["lora", "krona_b"], rank=2, scale=0.7)
    routes = {n: r.methods for n, r in report.layers.items()}
    assert [n for n, methods in routes.items() if methods == ("krona_b",)] == sites(kind)
    assert sum(methods == ("lora",) for methods in routes.values()) > 8 and not report.skipped
    perturb(model)
    both = logits(model)
    alone = []
    for off in ("lora", "krona_b"):
        copied = copy.deepcopy(model)
        for m in copied.modules():
            if off in getattr(m, "_modules", {}):
                m.enabled = False  # the site's adapter, of which the method is a child
        alone.append(logits(copied))
    assert (
        not torch.equal(alone[0], alone[1])
        and not torch.equal(alone[0], both)
        and not torch.equal(alone[1], both)
    )
    both.square().sum().backward()
    assert all(p.grad.any() for p in own(model).values())
    with fastpeft.adapters_off(model):
        assert torch.equal(logits(model), base)
    with pytest.raises(ValueError, match="merge: krona_b at"):
        fastpeft.merge(model)
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), both)
    fastpeft.unload(model)
    after = model.state_dict()
    assert (
        clean(model) and list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    )


def test_targets_name_sites_of_both_kinds():
    model = made("llama")
    report = fastpeft.adapt(model, ["krona_b", "lora"], rank=2, target_modules=["q_proj", "1.mlp", "nowhere"])
    assert {n: r.methods for n, r in report.layers.items()} == {
        "model.layers.0.self_attn.q_proj": ("lora",),
        "model.layers.1.self_attn.q_proj": ("lora",),
        "model.layers.1.mlp": ("krona_b",),
    }
    assert any("nowhere" in n and "1.mlp" not in n for n in report.notes)
    fastpeft.unload(model)
    with pytest.raises(ValueError, match=r"q_proj.*leave no FFN"):
        fastpeft.adapt(model, ["lora", "krona_b"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="matches no layer"):
        fastpeft.adapt(model, ["lora", "krona_b"], target_modules=["mlp"])
    assert clean(model)


TARGETS = [
    ({}, "01"),
    ({"target_modules": "all-linear"}, "01"),
    ({"target_modules": ["mlp"]}, "01"),
    ({"target_modules": ["0.mlp"]}, "0"),
    ({"target_modules": r".*layers\.1\..*"}, "1"),
    ({"exclude_modules": ["0.mlp"]}, "1"),
    ({"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"}, "0"),
    ({"modules_to_save": ["0.mlp"]}, "1"),
]


@pytest.mark.parametrize(("rules", "want"), TARGETS, ids=str)
def test_targets_filter_ffns(rules, want):
    report = fastpeft.adapt(made("llama"), "krona_b", **rules)
    assert report.adapted == [f"model.layers.{k}.mlp" for k in want]


def test_targets_that_leave_nothing_list_the_ffns():
    for rules in (
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["mlp"]},
        {"target_modules": r"layers"},
    ):
        model = made("llama")
        with pytest.raises(
            ValueError, match=r"krona_b.*its FFNs are model\.layers\.0\.mlp, model\.layers\.1\.mlp"
        ):
            fastpeft.adapt(model, "krona_b", **rules)
        assert clean(model)


@pytest.mark.parametrize("name", [*NAMES, "feed_forward", "FeedForward", "DenseReluDense", "MLP"])
def test_names_of_ffns(name):
    model = nn.ModuleDict({"block": nn.ModuleDict({name: MLP(), "other": MLP()})})
    assert fastpeft.adapt(model, "krona_b").adapted == [f"block.{name}"]


class Gated(nn.Module):
    """A feed-forward block around one `inner`, with a linear of its own."""

    def __init__(self, inner):
        super().__init__()
        self.ffn, self.gate = inner, nn.Linear(16, 16, dtype=DT)

    def forward(self, x):
        return torch.sigmoid(self.gate(x)) * self.ffn(x)


def test_the_innermost_module_is_the_ffn():
    assert fastpeft.adapt(nn.ModuleDict({"mlp": Gated(MLP())}), "krona_b").adapted == ["mlp.ffn"]
    assert fastpeft.adapt(nn.ModuleDict({"mlp": Gated(nn.Linear(16, 16))}), "krona_b").adapted == ["mlp"]


def test_a_container_that_is_never_called_is_no_ffn():
    """An adapter on a ModuleDict named mlp would be skipped: its linears are the pair of their block."""
    mlp = lambda: nn.ModuleDict({"up": nn.Linear(16, 32, dtype=DT), "down": nn.Linear(32, 16, dtype=DT)})  # noqa: E731
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": mlp()})])})
    assert fastpeft.adapt(model, "krona_b").adapted == ["layers.0"]
    with pytest.raises(ValueError, match=r"no FFN of ModuleDict.*to be named in target_modules: none"):
        fastpeft.adapt(nn.ModuleDict({"mlp": mlp()}), "krona_b", target_modules=["mlp"])


def test_without_an_ffn_candidates_are_listed_and_can_be_named():
    model = nn.ModuleDict({"encoder": nn.Sequential()})
    model["encoder"].dense, model["encoder"].head = MLP(), nn.Linear(16, 2, dtype=DT)
    with pytest.raises(ValueError, match=r"no FFN of ModuleDict.*feed_forward.*: encoder, encoder\.dense\."):
        fastpeft.adapt(model, "krona_b")
    assert fastpeft.adapt(model, "krona_b", target_modules=["encoder.dense"]).adapted == ["encoder.dense"]
    perturb(model)
    x, dense = rand(3, 16), model["encoder"].dense
    m = dense.adapter.krona_b
    assert_fp64(dense(x), dense.down(torch.tanh(dense.up(x))) + x @ torch.kron(m.A, m.B))
    with pytest.raises(ValueError, match="no FFN of MLP"):
        fastpeft.adapt(MLP(), "krona_b")


def test_mixers_beside_ffns_are_no_pairs():
    """A list of blocks some of which hold an FFN: the linears of the others are not taken for one."""
    blocks = nn.ModuleList(
        [
            nn.ModuleDict({"mlp": MLP()}),
            nn.ModuleDict({"in_proj": nn.Linear(16, 32), "out_proj": nn.Linear(32, 16)}),
        ]
    )
    assert fastpeft.adapt(nn.ModuleDict({"layers": blocks}), "krona_b").adapted == ["layers.0.mlp"]


def test_what_cannot_be_adapted_is_named():
    wide = nn.ModuleDict(
        {"ok": nn.ModuleDict({"mlp": MLP()}), "mlp": nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))}
    )
    with pytest.raises(ValueError, match="'mlp' reads 16 features and gives 8"):
        fastpeft.adapt(wide, "krona_b")
    assert clean(wide)
    assert fastpeft.adapt(wide, "krona_b", target_modules=["ok.mlp"]).adapted == ["ok.mlp"]
    pair = Pair(2)
    pair.blocks[1]["fc2"] = nn.Linear(32, 8)
    with pytest.raises(ValueError, match=r"'blocks\.1' reads 16 features and gives 8"):
        fastpeft.adapt(pair, "krona_b")
    taken = nn.ModuleDict({"mlp": MLP()})
    taken["mlp"].adapter = nn.Identity()
    with pytest.raises(ValueError, match="'mlp' has an attribute `adapter`"):
        fastpeft.adapt(taken, "krona_b")
    lazy = nn.ModuleDict({"mlp": nn.Sequential(nn.LazyLinear(32), nn.Linear(32, 8))})
    with pytest.raises(ValueError, match="'mlp' are not initialised yet"):
        fastpeft.adapt(lazy, "krona_b")
    again = nn.ModuleDict({"mlp": MLP()})
    fastpeft.adapt(again, "krona_b")
    with pytest.raises(ValueError, match="'mlp' is adapted already"):
        fastpeft.adapt(again, "krona_b_res")


def test_mixture_of_experts():
    """Experts in 3-D parameters are named; a block that also holds linears is adapted as a whole."""
    transformers = pytest.importorskip("transformers")
    few = dict(num_key_value_heads=2)
    mixtral = transformers.MixtralModel(transformers.MixtralConfig(**SMALL, **few, num_local_experts=2))
    with pytest.raises(
        ValueError,
        match=r"krona_b.*Left alone: layers\.0\.mlp: its experts are 3-D parameters.*layers\.1\.mlp",
    ):
        fastpeft.adapt(mixtral, "krona_b")
    with pytest.raises(ValueError, match=r"cannot adapt 'layers\.0\.mlp': its experts"):
        fastpeft.adapt(mixtral, "krona_b", target_modules=["0.mlp"])
    mixed = nn.ModuleDict({"a": mixtral, "b": nn.ModuleDict({"mlp": MLP()})})
    report = fastpeft.adapt(mixed, "krona_b")
    assert report.adapted == ["b.mlp"] and list(report.skipped) == ["a.layers.0.mlp", "a.layers.1.mlp"]
    assert "3-D parameters" in str(report)

    sizes = dict(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    qwen = transformers.Qwen2MoeModel(transformers.Qwen2MoeConfig(**SMALL, **few, **sizes)).eval()
    base = qwen(input_ids=IDS).last_hidden_state
    assert fastpeft.adapt(qwen, "krona_b").adapted == ["layers.0.mlp", "layers.1.mlp"]
    perturb(qwen)
    qwen(input_ids=IDS).last_hidden_state.square().sum().backward()
    assert all(p.grad.any() for p in own(qwen).values())
    with fastpeft.adapters_off(qwen):
        assert torch.equal(qwen(input_ids=IDS).last_hidden_state, base)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fused_encoder_path_runs_the_adapter(norm_first):
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=DT
    )
    model, x = (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval(),
        rand(3, 5, 16, grad=False),
    )
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    keep = ~padding

    def attributes():
        return [{k: v for k, v in m.__dict__.items() if isinstance(v, (int, bool))} for m in model.modules()]

    with torch.no_grad():
        base, before = model(x, src_key_padding_mask=padding), attributes()
    assert fastpeft.adapt(model, "krona_b").adapted == ["layers.0", "layers.1"]
    perturb(model)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
    assert_fp64(fast[keep], model(x, src_key_padding_mask=padding).detach()[keep], "eval without grad")
    assert not torch.allclose(fast[keep], base[keep])
    fastpeft.unload(model)
    assert attributes() == before
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=padding), base)


def test_a_head_that_trains_beside_it(tmp_path):
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertForSequenceClassification

    def make():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)).eval()

    model, fresh = make(), make()
    base = logits(model)
    report = fastpeft.adapt(model, "krona_b", modules_to_save=["classifier"], bias="all")
    assert report.saved_modules == ["classifier"] and report.adapted == sites("bert")
    perturb(model)
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model)) and not torch.equal(logits(model), base)
    with fastpeft.adapters_off(model):
        assert torch.equal(logits(model), base)


def test_hooks_hold_no_module():
    """Plain functions: a closure over a module would tie a deepcopy to the original."""
    from fastpeft import beside

    for kind in ("llama", "opt"):
        model = made(kind)
        fastpeft.adapt(model, "krona_b")
        hooks = [
            h for m in model.modules() for h in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
        ]
        assert len(hooks) == (2 if kind == "llama" else 4)
        for hook in hooks:
            assert (
                isinstance(hook, types.FunctionType)
                and hook.__closure__ is None
                and Path(hook.__code__.co_filename) == Path(beside.__file__)
            )
