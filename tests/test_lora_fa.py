"""LoRA-FA against stock PEFT with a frozen A: gradients, the memory that it saves, and folders."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import DT, MLP, perturb, rand
from tolerance import assert_fp64

import fastpeft

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, moved, peft_logits

IN, OUT, ALPHA = 12, 10, 5.0


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("options", [dict(rank=3), dict(rank=3, dropout=0.3), dict(rank=10, dropout=0.3, bias=False)], ids=str)
def test_equals_peft_lora_with_frozen_a(options, lead):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="lora_fa", dtype=DT, alpha=ALPHA, **options))
    m = layer.adapter.lora_fa
    assert [n for n, p in m.named_parameters() if p.requires_grad] == ["B"]
    assert_equals_peft(layer, lambda: (m.A, m.B * 1), ALPHA, lead, options.get("dropout", 0.0))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_storage_of_x_is_kept(dropout):
    """Also where x came through a view; rank numbers per token, and with dropout the seed."""
    tokens, rank = 64, 3
    layer = fastpeft.AdaptedLinear(IN, OUT, method="lora_fa", rank=rank, dropout=dropout).train()
    source = torch.randn(8, tokens // 8, IN)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = source.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x.transpose(0, 1))
    assert x.untyped_storage().data_ptr() not in kept
    assert sum(size for at, size in kept.items() if at not in own) == tokens * rank * 4 + (8 if dropout else 0)
    y.sum().backward()
    assert x.grad is not None and layer.adapter.lora_fa.B.grad.any()


def test_a_stays_and_the_update_keeps_its_row_space():
    layer = fastpeft.AdaptedLinear(IN, OUT, method="lora_fa", rank=3, dtype=DT)
    m = layer.adapter.lora_fa
    start = m.A.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(rand(9, IN)).square().sum().backward()
        optimizer.step()
    assert torch.equal(m.A, start) and m.A.grad is None and m.B.any()
    assert torch.linalg.matrix_rank(torch.cat([m.A, m.B @ m.A])) == 3


def test_starts_as_lora():
    m = fastpeft.AdaptedLinear(256, 64, method="lora_fa", rank=16).adapter.lora_fa
    assert not m.B.any() and 0.95 / 16 < m.A.abs().max() <= 1 / 16


@pytest.mark.parametrize("rslora", [False, True])
def test_folder_is_a_plain_lora_for_peft_and_lora_fa_here(rslora, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model, fresh, other = (copy.deepcopy(plain) for _ in range(3))
    fastpeft.adapt(model, "lora_fa", rank=3, alpha=7, rslora=rslora, rank_pattern={"down": 2})
    want = perturb(model).eval()(x)
    assert (want - plain(x)).abs().max() > 0.1
    fastpeft.save_adapter(model, tmp_path)
    assert_fp64(peft_logits(plain, tmp_path, x), want)

    fastpeft.load_adapter(fresh, tmp_path)
    m = fresh.up.adapter.lora_fa
    assert torch.equal(fresh.eval()(x), want) and m.B.requires_grad and not m.A.requires_grad
    fastpeft.adapt(other, "lora", rank=3, alpha=7, rslora=rslora, rank_pattern={"down": 2})
    with pytest.raises(fastpeft.CheckpointError, match=r"lora_fa.*adapted with \['lora'\]"):
        fastpeft.load_adapter(other, tmp_path)


def test_a_folder_that_only_names_lora_fa_is_read_by_its_config(tmp_path):
    """The note in the header counts only where the config is the one that lora_fa would have written."""
    from fastpeft.checkpoint import _method_of

    model = MLP()
    fastpeft.adapt(model, "lora_fa", rank=3)
    fastpeft.save_adapter(model, tmp_path)
    config = fastpeft.folder.read_folder(tmp_path)[0]
    note = {"methods": ["lora_fa"], "options": {"rank": 3}}
    assert _method_of(config, note, "lora") == "lora_fa"
    assert _method_of(config | {"lora_bias": True}, note, "lora") == "lora"
    assert _method_of(config | {"use_dora": True}, note, "dora") == "dora"
    assert _method_of(config, {"methods": ["melora"], "options": {}}, "lora") == "lora"
    assert _method_of(config, {}, "lora") == "lora"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(rank=0), ValueError, r"lora_fa: rank=0 at 'up'.*1 to 16"),
        (dict(rank=17), ValueError, r"rank=17.*rank_pattern"),
        (dict(rank=2.0), TypeError, "rank=2.0"),
        (dict(dropout=1.0), ValueError, r"lora_fa: dropout=1.0"),
        (dict(lora_bias=True), ValueError, r"'lora_bias' does not exist.*rslora"),
    ],
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.adapt(MLP(), "lora_fa", **options)
