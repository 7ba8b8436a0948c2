"""LyCORIS' LoRA, DoRA, LoHa and LoKr files, written by LyCORIS, give the same logits here; damaged or foreign ones change nothing."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastpeft
from fastpeft import CheckpointError
from fastpeft.integrations import lycoris
from fastpeft.integrations.lycoris import load_lycoris
from fastpeft.method.lokr import LoKr

pytest.importorskip("lycoris")
pytest.importorskip("peft")
pytest.importorskip("transformers")
import transformers
from lycoris import LycorisNetwork, create_lycoris_from_weights
from test_checkpoint_faults import assert_untouched, snapshot
from test_loha import double
from test_peft_io import logits
from tolerance import assert_fp64


def bert(hidden: int = 32, inner: int = 72) -> nn.Module:
    """Sides 32 = 4 * 8, 72 = 8 * 9, 3 labels; fp64."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=inner, num_labels=3,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double().eval()


def written(
    model: nn.Module, path: Path, kind: str, layers: Any = None, dtype: Any = None, **options: Any
) -> LycorisNetwork:
    """LyCORIS' network over the linear layers of `model`, acting on it, moved from its start, and saved by LyCORIS.

    layers: name pattern -> options of these layers.
    """
    preset = {
        "target_module": ["Linear"],
        "name_algo_map": layers or {},
        "target_name": [],
        "exclude_name": [],
        "module_algo_map": {},
    }
    LycorisNetwork.apply_preset(preset)
    with double():
        net = LycorisNetwork(
            model, network_module=kind, warn_on_unmatched=False, **({"lora_dim": 3, "alpha": 2} | options)
        )
    net.apply_to()
    net.double()  # DoRA's magnitudes, which it makes in fp32
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    net.save_weights(str(path), dtype, None)
    return net.eval()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("locon", {}),
    "lora, rs_lora": ("locon", {"alpha": 5, "rs_lora": True}),
    "lora, scalar": ("locon", {"use_scalar": True}),
    "lora, layers": ("locon", {"layers": {".*query": {"dim": 2, "alpha": 9}, ".*1.*value": {"dim": 5}}}),
    "dora": ("locon", {"weight_decompose": True, "wd_on_output": True}),
    "loha": ("loha", {}),
    "loha, alpha above the rank": ("loha", {"alpha": 7.3}),
    "loha, rs_lora": ("loha", {"alpha": 5, "rs_lora": True}),
    "loha, scalar": ("loha", {"use_scalar": True}),
    "loha, bypass": ("loha", {"bypass_mode": True}),
    "loha, layers": ("loha", {"layers": {".*query": {"dim": 2, "alpha": 9}, ".*1.*value": {"dim": 5}}}),
    "lokr": ("lokr", {}),
    "lokr, some whole": ("lokr", {"lora_dim": 4}),
    "lokr, rs_lora": ("lokr", {"lora_dim": 2, "rs_lora": True}),
    "lokr, scalar": ("lokr", {"use_scalar": True}),
    "lokr, bypass": ("lokr", {"bypass_mode": True}),
    "lokr, factor 4": ("lokr", {"factor": 4}),
    "lokr, factor beyond the root": ("lokr", {"factor": 16}),
    "lokr, factor that divides nothing": ("lokr", {"factor": 5}),
    "lokr, decompose_both": ("lokr", {"lora_dim": 1, "decompose_both": True}),
    "lokr, full_matrix": ("lokr", {"full_matrix": True, "factor": 2}),
    "lokr, full by rank": ("lokr", {"lora_dim": 100000, "factor": 8}),
    "lokr, unbalanced": ("lokr", {"unbalanced_factorization": True, "lora_dim": 1, "decompose_both": True}),
    "lokr, layers": ("lokr", {"layers": {".*query": {"dim": 1, "alpha": 9}, ".*key": {"full_matrix": True}}}),
}  # fmt: skip


def check_logits(case: str, path: Path) -> None:
    kind, options = CASES[case]
    theirs, ours = bert(), bert()
    net = written(theirs, path, kind, **options)
    want, base, state = logits(theirs), logits(ours), torch.random.get_rng_state()
    report = load_lycoris(ours, path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (want - base).abs().max() > 1e-2
    assert_fp64(logits(ours), want)
    assert {f"lycoris_{n.replace('.', '_')}" for n in report.adapted} == {m.lora_name for m in net.loras}
    assert report.trainable == sum(p.numel() for n, p in net.named_parameters() if not n.endswith("scalar"))
    assert not any(p.requires_grad for n, p in ours.named_parameters() if ".adapter." not in n)


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_lycoris_logits(case: str, tmp_path: Path) -> None:
    check_logits(case, tmp_path / "a.safetensors")


@pytest.mark.parametrize("case", [c for c in CASES if not re.search("layers|unbalanced|scalar|beyond|dora", c)])
def test_lycoris_reads_its_file_as_we_do(case: str, tmp_path: Path) -> None:
    """Its reader finds the options in another way; where it stops (unbalanced, a factor beyond the root), ours goes on.
    DoRA's magnitudes it rounds to fp32 there, so only its own network is held against ours."""
    kind, options = CASES[case]
    path, theirs, ours = tmp_path / "a.safetensors", bert(), bert()
    written(bert(), path, kind, **options)
    with double():
        net, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    net.apply_to()
    load_lycoris(ours, path)
    assert_fp64(logits(ours), logits(theirs))


def stack(*sizes: int) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(*(nn.Linear(n, m, dtype=torch.float64) for n, m in itertools.pairwise(sizes)))


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_networks(first: int, tmp_path: Path) -> None:
    """20 stacks of linear layers of random sizes and options; sizes are products, so that there is something to split."""
    path = tmp_path / "a.safetensors"
    for case in range(first, first + 20):
        rng = random.Random(case)
        sizes = [rng.randint(1, 9) * rng.randint(1, 9) for _ in range(4)]
        rank = rng.randint(1, min(*sizes, 5))
        flags = {k: rng.random() < 0.5 for k in ("decompose_both", "unbalanced_factorization")}
        own = (
            {"factor": rng.choice([-1, rng.randint(1, 9), rng.randint(1, 30)]), **flags}
            if rng.random() < 0.8
            else {}
        )
        theirs, ours = stack(*sizes), stack(*sizes)
        written(theirs, path, "lokr" if own else "loha", lora_dim=rank, alpha=rng.choice([1, 4, 2.5]), **own)
        load_lycoris(ours, path)
        x = torch.randn(5, sizes[0], dtype=torch.float64)
        assert_fp64(ours(x), theirs(x), f"{case}: {sizes}, {rank=}, {own}")


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        # 7 divides neither 360 nor 12, and no other factor, -1 included, gives (6, 60) and (3, 4)
        ((360, 12), {"factor": 7}),
        # the turned pair of the output makes the first half the larger: low-rank beside a whole second one
        ((16, 48), {"factor": 2, "lora_dim": 4, "decompose_both": True, "unbalanced_factorization": True}),
        ((1, 1), {"lora_dim": 1}),
        ((13, 17), {"lora_dim": 2}),
    ],
    ids=str,
)
def test_splits_that_only_one_choice_gives(
    sizes: tuple[int, ...], options: dict[str, Any], tmp_path: Path
) -> None:
    path, theirs, ours = tmp_path / "a.safetensors", stack(*sizes), stack(*sizes)
    written(theirs, path, "lokr", **options)
    load_lycoris(ours, path)
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    assert_fp64(ours(x), theirs(x))


@pytest.mark.parametrize("case", ["loha, layers", "lokr, layers", "lokr, some whole", "lokr, unbalanced"])
def test_the_loaded_model_is_saved_and_loaded_as_any_other(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    path, theirs, model, fresh = tmp_path / "a.safetensors", bert(), bert(), bert()
    written(theirs, path, kind, **options)
    load_lycoris(model, path)
    fastpeft.save_adapter(model, tmp_path / "folder")
    fastpeft.load_adapter(fresh, tmp_path / "folder")
    assert torch.equal(logits(fresh), logits(model))
    want = logits(theirs)
    assert_fp64(logits(fastpeft.merge(model)), want)
    fastpeft.unload(fresh)
    assert_untouched(fresh, snapshot(bert()))


def test_whole_layers_ask_for_no_alpha_of_their_own(tmp_path: Path) -> None:
    """LyCORIS stores the rank as theirs; only their scale, 1, matters."""
    path, model = tmp_path / "a.safetensors", bert()
    written(bert(), path, "lokr", lora_dim=4, alpha=9)
    load_lycoris(model, path)
    scales = {n: m.scale for n, m in model.named_modules() if isinstance(m, LoKr)}
    assert set(scales.values()) == {1.0, 9 / 4} and scales["bert.pooler.dense.adapter.lokr"] == 1.0
    fastpeft.save_adapter(model, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert config["options"] == {
        "flavor": "lycoris",
        "factor": -1,
        "unbalanced": False,
        "decompose_both": False,
        "rank": 4,
        "alpha": 9.0,
    }
    assert not config["rank_pattern"] and not config["alpha_pattern"]


@pytest.mark.parametrize("as_given", [str, Path])
def test_load_adapter_takes_the_file(as_given: Any, tmp_path: Path) -> None:
    path, theirs, ours = tmp_path / "a.safetensors", bert(), bert()
    written(theirs, path, "loha")
    assert len(fastpeft.load_adapter(ours, as_given(path)).adapted) == 14
    assert_fp64(logits(ours), logits(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_16_bit_files_are_widened_without_loss(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", bert().to(torch.bfloat16)
    written(bert(), path, kind, dtype=dtype)
    load_lycoris(model, path)
    adapter = model.get_submodule("bert.pooler.dense").adapter.get_submodule(kind)
    tensors = {
        k.partition(".")[2]: t
        for k, t in load_file(path).items()
        if k.startswith("lycoris_bert_pooler_dense.")
    }
    assert tensors.keys() - {"alpha"} == {
        f"{'hada' if kind == 'loha' else 'lokr'}_{n}" for n, _ in adapter.named_parameters()
    }
    for name, p in adapter.named_parameters():
        (came,) = (t for leaf, t in tensors.items() if leaf.partition("_")[2] == name)
        assert p.dtype == torch.float32 and came.dtype == dtype and torch.equal(p, came.float())


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("change", ["absent", "zero"])
def test_no_alpha_is_the_rank(kind: str, change: str, tmp_path: Path) -> None:
    path, theirs, ours = tmp_path / "a.safetensors", bert(), bert()
    written(theirs, path, kind, alpha=3)  # the rank
    zero = {k: torch.zeros_like(t) for k, t in load_file(path).items() if k.endswith("alpha")}
    rest = {k: t for k, t in load_file(path).items() if k not in zero}
    save_file(rest | (zero if change == "zero" else {}), path)
    load_lycoris(ours, path)
    assert_fp64(logits(ours), logits(theirs))


def test_prefix(tmp_path: Path) -> None:
    path, theirs, ours = tmp_path / "a.safetensors", bert(), bert()
    written(theirs, path, "loha")
    save_file({k.replace("lycoris_", "lora_te_", 1): t for k, t in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"not understood: lora_te_.*another prefix"):
        load_lycoris(ours, path)
    load_lycoris(ours, path, prefix="lora_te")
    assert_fp64(logits(ours), logits(theirs))


# ---- names


class Named(nn.Module):
    """A tree of modules by dotted names; forward is the sum of its linear layers."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for path, module in modules.items():
            owner: nn.Module = self
            *parents, last = path.split(".")
            for name in parents:
                if name not in owner._modules:
                    owner.add_module(name, nn.Module())
                owner = owner.get_submodule(name)
            owner.add_module(last, module)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([m(x) for m in self.modules() if isinstance(m, nn.Linear)]).sum(0)


def named(**modules: Any) -> Named:
    torch.manual_seed(4)
    return Named(**{name: make() for name, make in modules.items()})


def linear() -> nn.Linear:
    return nn.Linear(6, 6, dtype=torch.float64)


def test_names_that_end_alike_keep_their_own_options(tmp_path: Path) -> None:
    path, names = tmp_path / "a.safetensors", ["lin", "deep.lin", "a.deep.lin"]
    theirs, ours, part = (named(**dict.fromkeys(names, linear)) for _ in range(3))
    written(theirs, path, "loha", {"^lin": {"dim": 1}, "^deep.lin": {"dim": 2, "alpha": 5}}, alpha=3)
    assert set(load_lycoris(ours, path).adapted) == set(names)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_fp64(ours(x), theirs(x))
    save_file({k: t for k, t in load_file(path).items() if k.startswith("lycoris_lin.")}, path)
    assert load_lycoris(part, path).adapted == ["lin"]


def test_two_modules_of_one_name_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(named(**{"a_b.c": linear, "d": linear}), path, "loha")
    model = named(**{"a_b.c": linear, "a.b_c": linear, "d": linear})
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"lycoris_a_b_c .*'a_b\.c' or 'a\.b_c'"):
        load_lycoris(model, path)
    assert_untouched(model, before)
    other = named(**{"a_b.c": linear, "a.b_c": lambda: nn.LayerNorm(6), "d": linear})
    assert set(load_lycoris(other, path).adapted) == {"a_b.c", "d"}


# ---- what is refused


QUERY = "lycoris_bert_encoder_layer_0_attention_self_query"


def put(leaf: str, value: Any) -> Any:
    return lambda t: t.update({f"{QUERY}.{leaf}": value(t) if callable(value) else value})


def drop(leaf: str) -> Any:
    return lambda t: t.pop(f"{QUERY}.{leaf}")


def changed(leaf: str, change: Any) -> Any:
    return put(leaf, lambda t: change(t[f"{QUERY}.{leaf}"]).contiguous())


def other_kind(t: dict[str, Tensor], *leaves: str) -> None:
    """One layer of another method among the others."""
    for key in [k for k in t if k.startswith(f"{QUERY}.")]:
        del t[key]
    t.update({f"{QUERY}.{leaf}": torch.ones(4, 4) for leaf in leaves})


DAMAGE = [
    ("loha", drop("hada_w2_b"), r"self_query: it has hada_w1_a, hada_w1_b, hada_w2_a; needed are .*hada_w2_b"),
    ("lokr", drop("lokr_w2_b"), r"self_query: it has lokr_w1, lokr_w2_a; needed are lokr_w1 or"),
    ("lokr", put("lokr_w2", torch.ones(8, 8)), r"it has lokr_w1, lokr_w2, lokr_w2_a, lokr_w2_b"),
    ("loha", put("lokr_w1", torch.ones(4, 4)), r"self_query: it has .*lokr_w1; needed are"),
    ("loha", lambda t: t.update({"lycoris_bert_other.alpha": torch.ones(())}), r"bert_other: it has an alpha only"),
    ("loha", put("dora_scale", torch.ones(32, 1)), r"self_query: it has dora_scale, hada_.*; needed are"),
    ("locon", put("dora_scale", torch.ones(1, 32)), r"self_query: dora_scale is \(1, 32\), needed one number per output"),
    ("locon", put("dora_scale", torch.ones(32, 1).double()), r"holds 2 methods.*'dora': .*'lora'"),
    ("locon", drop("lora_up.weight"), r"self_query: it has lora_down.weight; needed are lora_down.weight and lora_up.weight"),
    ("locon", put("lora_mid.weight", torch.ones(3, 3, 1, 1)), r"lora_mid.weight \(Tucker"),
    ("locon", changed("lora_down.weight", lambda p: p[:, :-1]), r"wrong shape: .*lora_down.weight"),
    ("locon", changed("lora_up.weight", lambda p: p * float("nan")), r"NaN or Inf: .*lora_up.weight"),
    ("loha", put("hada_t1", torch.ones(3, 3, 3, 3)), r"hada_t1 \(Tucker"),
    ("lokr", put("lokr_t2", torch.ones(3, 3, 3, 3)), r"lokr_t2 \(Tucker"),
    ("loha", put("lora_up.weight", torch.ones(3, 3)), r"self_query: it has .*lora_up.weight; needed are"),
    ("loha", changed("hada_w1_b", lambda p: p[..., None, None]), r"hada_w1_b is \(3, 32, 1, 1\).*convolutions"),
    ("loha", changed("hada_w1_a", torch.t), r"wrong shape: .*hada_w1_a is \(3, 32\), needed \(32, 3\)"),
    ("loha", changed("hada_w2_b", lambda p: p[:, :-1]), r"wrong shape: .*hada_w2_b"),
    ("loha", changed("hada_w1_b", lambda p: p[:0]), r"hada_w1_b is \(0, 32\), and holds nothing"),
    ("loha", changed("hada_w1_b", lambda p: torch.ones(33, 32, dtype=p.dtype)), r"does not fit this model: .*rank=33"),
    ("lokr", changed("lokr_w2_a", lambda p: p[:, :2]), r"wrong shape: .*lokr_w2_a"),
    ("lokr", changed("lokr_w1", lambda p: p[:, :3]), r"wrong shape|do not give together"),
    ("lokr", changed("lokr_w1", lambda p: p[:0]), r"lokr_w1 is \(0, 4\), and holds nothing"),
    ("loha", changed("hada_w1_a", lambda p: p * float("nan")), r"NaN or Inf: .*hada_w1_a"),
    ("lokr", changed("lokr_w1", lambda p: p / 0), r"NaN or Inf: .*lokr_w1"),
    ("loha", changed("hada_w1_a", lambda p: p.int()), r"wrong dtype: .*hada_w1_a"),
    ("loha", changed("hada_w1_a", lambda p: p.half()), r"several dtypes"),
    ("loha", put("alpha", torch.tensor(float("inf"))), r"self_query: alpha is inf, needed one finite number"),
    ("loha", put("alpha", torch.ones(2)), r"self_query: alpha is \[1.0, 1.0\]"),
    ("loha", lambda t: t.update({k.replace("query", "nowhere"): v.clone() for k, v in t.items() if "0_attention_self_query" in k}), r"BertFor\w+ lacks: .*nowhere"),
    ("loha", lambda t: t.update({k.replace(QUERY, "lycoris_bert_embeddings_LayerNorm"): v.clone() for k, v in t.items() if QUERY in k}), r"LayerNorm\); only linear"),
    ("loha", put("alpha", torch.tensor([])), r"self_query: alpha is \[\]"),
    ("loha", lambda t: other_kind(t, "lokr_w1", "lokr_w2"), r"holds 2 methods"),
    ("loha", lambda t: t.clear(), r"holds no tensor"),
    ("loha", lambda t: (t.clear(), t.update({"base_model.model.bert.pooler.dense.hada_w1_a": torch.ones(2, 2)})), r"not understood: base_model.*give the folder to load_adapter"),
]  # fmt: skip


def refused(model: nn.Module, path: Path, words: str) -> None:
    before, state = snapshot(model), torch.random.get_rng_state()
    for load in (load_lycoris, fastpeft.load_adapter):
        with pytest.raises(CheckpointError, match=words) as caught:
            load(model, path)
        assert str(path) in str(caught.value) or "adapted already" in words
    assert_untouched(model, before)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(("kind", "damage", "words"), DAMAGE, ids=[w for _, _, w in DAMAGE])
def test_a_damaged_file_changes_nothing(kind: str, damage: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(bert(), path, kind)
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    refused(bert(), path, words)


def test_a_truncated_a_foreign_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(bert(), path, "loha")
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:5], b"", b"PK" + whole):
        path.write_bytes(data)
        refused(bert(), path, "no readable safetensors file")
    for load in (load_lycoris, fastpeft.load_adapter):
        with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors does not exist"):
            load(bert(), tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_file_of_another_model_or_for_an_adapted_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(bert(), path, kind)
    refused(bert(hidden=48), path, r"does not belong to this model: .*needed")
    model = bert()
    load_lycoris(model, path)
    refused(model, path, "adapted already")
    refused(bert().float(), path, r"wrong dtype: .*float64, needed torch.float32")


def test_layers_that_the_options_do_not_give_together_are_listed(tmp_path: Path) -> None:
    """adapt has rank and alpha by layer; factor, unbalanced and decompose_both are one for all."""
    path, few = tmp_path / "a.safetensors", ".*0.attention.self.query"
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"factor": 4}, {"factor": 2}, r"w1 \(2, 2\) and w2 \(16, 16\) of rank 3"),
        ({}, {"unbalanced_factorization": True}, r"w1 \(8, 4\) and w2 \(4, 8\) of rank 3"),
        (
            {"lora_dim": 1, "decompose_both": True},
            {"decompose_both": False},
            r"w1 \(4, 4\) and w2 \(8, 8\) of rank 1",
        ),
    ]
    for options, own, words in cases:
        written(bert(), path, "lokr", {few: own}, **options)
        refused(
            bert(),
            path,
            rf"not give together .*=(True|False)\): bert\.encoder\.layer\.0\.attention\.self\.query: {words}\.$",
        )
    written(bert(), path, "lokr", lora_dim=1, decompose_both=True)
    tensors = load_file(path)
    tensors |= {
        f"{QUERY}.lokr_w1_a": torch.ones(4, 2).double(),
        f"{QUERY}.lokr_w1_b": torch.ones(2, 4).double(),
    }
    save_file(tensors, path)
    refused(bert(), path, r"self\.query: w1 \(4, 4\) of rank 2 and w2 \(8, 8\) of rank 1\.$")


# ---- planted faults


def alphas_ignored(monkeypatch: Any) -> None:
    monkeypatch.setattr(lycoris, "_alpha", lambda alpha: None)


def layers_alike(monkeypatch: Any) -> None:
    real = lycoris.per_layer
    monkeypatch.setattr(lycoris, "per_layer", lambda key, values: {key: real(key, values)[key]})


def only_alphas_alike(monkeypatch: Any) -> None:
    real = lycoris.per_layer
    monkeypatch.setattr(
        lycoris, "per_layer", lambda key, values: real(key, values) if key == "rank" else {key: 2}
    )


def always_balanced(monkeypatch: Any) -> None:
    monkeypatch.setattr(lycoris, "_splitting", lambda halves: (-1, False))


def values_not_copied(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        lycoris, "_live", lambda model, layer, kind: ((k, t.clone()) for k, t in LIVE(model, layer, kind))
    )


LIVE = lycoris._live
FAULTS = [
    (alphas_ignored, "loha"),
    (alphas_ignored, "lokr"),
    (layers_alike, "loha, layers"),
    (only_alphas_alike, "loha, layers"),
    (only_alphas_alike, "lokr, layers"),
    (always_balanced, "lokr, unbalanced"),
    (always_balanced, "lokr, factor 4"),
    (values_not_copied, "loha"),
    (values_not_copied, "lokr"),
]


@pytest.mark.parametrize(("plant", "case"), FAULTS)
def test_planted_fault_is_found(plant: Any, case: str, monkeypatch: Any, tmp_path: Path) -> None:
    with monkeypatch.context() as planted:
        plant(planted)
        with pytest.raises((AssertionError, CheckpointError)):
            check_logits(case, tmp_path / "a.safetensors")
    check_logits(case, tmp_path / "a.safetensors")
