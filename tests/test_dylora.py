"""DyLoRA: at every rank b the layer is stock PEFT's LoRA of rank b, in one compiled graph; both gradient patterns; folders."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch._dynamo.testing
from checks import DT, MLP, perturb, rand
from test_methods import grads
from tolerance import assert_fp64

import fastpeft
from fastpeft.method.dylora import DyLoRA, set_rank

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, moved, peft_logits, peft_lora

IN, OUT, RANK, ALPHA = 12, 10, 4, 5.0


def built(**options):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="dylora", rank=RANK, dtype=DT, alpha=ALPHA, **options))
    return layer, layer.adapter.dylora


def adapted(rank=RANK, **options):
    model = MLP()
    fastpeft.adapt(model, "dylora", rank=rank, alpha=ALPHA, **options)
    return perturb(model)


@pytest.mark.parametrize("b", range(1, RANK + 1))
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "bias": False}, {"mode": "frozen"}, {"mode": "frozen", "dropout": 0.3}], ids=str)
def test_equals_peft_lora_of_rank_b(options, b):
    layer, m = built(**options)
    for at in (b % RANK + 1, b):  # another rank first: a mask that stays behind would show
        set_rank(layer, at)

    def compose():
        if options.get("mode") != "frozen":
            return m.A[:b], m.B[:, :b]
        A, B = m.A.detach()[:b].clone(), m.B.detach()[:, :b].clone()
        A[b - 1], B[:, b - 1] = m.A[b - 1], m.B[:, b - 1]
        return A, B

    for lead in LEADS:
        assert_equals_peft(layer, compose, ALPHA, lead, options.get("dropout", 0.0))


@pytest.mark.parametrize(("mode", "rows"), [("full", [0, 1, 2]), ("frozen", [2])])
def test_gradient_pattern(mode, rows):
    """Exactly the named rows of A and columns of B get a gradient at b = 3; the others get zeros."""
    layer, m = built(mode=mode)
    layer.adapter.dylora.set_rank(3)
    layer(rand(9, IN)).square().sum().backward()
    assert [i for i in range(RANK) if m.A.grad[i].any()] == rows
    assert [i for i in range(RANK) if m.B.grad[:, i].any()] == rows


def test_eval_at_b_is_peft_of_the_slices_and_b_starts_at_the_rank():
    layer, m = built()
    assert m.b == RANK
    x = rand(9, IN)
    for b in range(1, RANK + 1):
        m.set_rank(b)
        with torch.no_grad():
            assert_fp64(layer.eval()(x), peft_lora(layer, m.A[:b], m.B[:, :b], ALPHA).eval()(x), f"b={b}")


@pytest.mark.parametrize(("alpha", "want"), [(16, [16.0, 4.0, 2.0])])
def test_the_scale_follows_b(alpha, want):
    m = fastpeft.AdaptedLinear(IN, OUT, method="dylora", rank=8, alpha=alpha).adapter.dylora
    for b, s in zip((1, 4, 8), want, strict=True):
        m.set_rank(b)
        assert m.live.tolist() == [s] * b + [0.0] * (8 - b)


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_one_graph_for_all_ranks(mode):
    """Twelve ranks are more than Dynamo's recompile limit: a graph per rank would fail."""
    model, graphs = adapted(12, mode=mode).train(), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for b in range(1, 13):
        set_rank(model, b)
        x = rand(5 if b < 7 else 6, 16)
        got, want = compiled(x), model(x)
        assert_fp64(got, want, f"y at {b}")
        exact = grads(want, model, x)
        for n, g in grads(got, model, x).items():
            assert_fp64(g, exact[n], f"{n} at {b}")
    assert graphs.frame_count <= 2, f"{graphs.frame_count} graphs for twelve ranks and two batch sizes"


@pytest.mark.parametrize("b", [1, 3, RANK])
def test_merge_and_export_take_the_rank_in_use(b, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "dylora", rank=RANK, alpha=ALPHA)
    set_rank(perturb(model).eval(), b)
    want = model(x)
    fastpeft.export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == b
    assert_fp64(peft_logits(plain, tmp_path, x), want)
    assert_fp64(fastpeft.merge(model)(x), want)


def test_a_folder_holds_every_rank_and_b_is_not_saved(tmp_path):
    model, fresh, x = adapted().eval(), MLP(), rand(5, 16)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapter." not in k})
    wants = []
    for b in (4, 2):
        set_rank(model, b)
        wants.append(model(x))
    fastpeft.save_adapter(model, tmp_path)
    assert set(model.up.adapter.dylora.state_dict()) == {"A", "B"}
    fastpeft.load_adapter(fresh.eval(), tmp_path)
    assert fresh.up.adapter.dylora.b == RANK and torch.equal(fresh(x), wants[0])
    set_rank(fresh, 2)
    assert torch.equal(fresh(x), wants[1])


def test_a_change_between_forward_and_backward_is_refused():
    layer, m = built()
    y = layer(rand(9, IN))
    m.set_rank(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_masks_survive_casts_and_a_start_on_the_meta_device():
    layer = fastpeft.AdaptedLinear(IN, OUT, method="dylora", rank=RANK, alpha=ALPHA, mode="frozen", device="meta")
    layer.adapter.dylora.set_rank(3)
    m = layer.to_empty(device="cpu").adapter.dylora
    assert m.live.tolist() == [torch.tensor(ALPHA / 3).item()] * 3 + [0.0] and m.trains.tolist() == [False, False, True, False]
    m = layer.to(torch.bfloat16).to(DT).adapter.dylora
    assert m.live.tolist() == [ALPHA / 3] * 3 + [0.0]


def test_ranks_that_do_not_fit_change_nothing():
    model = adapted(rank_pattern={"down": 2})
    layers = [m for m in model.modules() if isinstance(m, DyLoRA)]
    assert [m.b for m in layers] == [RANK, 2]
    before = [m.live.clone() for m in layers]
    for b, error, words in (
        (3, ValueError, r"dylora.set_rank: b=3 at 'down'.*1 to 2, the layer's rank"),
        (0, ValueError, r"b=0 at 'up'.*1 to 4"),
        (True, TypeError, r"b=True.*int"),
        (1.0, TypeError, r"b=1.0.*int"),
    ):
        with pytest.raises(error, match=words):
            set_rank(model, b)
        assert [m.b for m in layers] == [RANK, 2] and all(torch.equal(m.live, w) for m, w in zip(layers, before, strict=True))
    set_rank(model, 2)
    assert [m.b for m in layers] == [2, 2]


def test_errors():
    with pytest.raises(ValueError, match=r"set_rank: this MLP has no dylora layer; adapt it"):
        set_rank(MLP(), 1)
    with pytest.raises(ValueError, match=r"mode='half'; it must be 'full' or 'frozen'"):
        adapted(mode="half")
    with pytest.raises(ValueError, match=r"dylora: rank=17 at 'up'"):
        adapted(rank=17)
