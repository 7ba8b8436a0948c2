"""ALoRA's layer: live ranks are stock PEFT's LoRA, closed ranks stay at zero under any optimiser, opened ones change no output."""

from __future__ import annotations

import copy

import papers
import pytest
import torch
import torch._dynamo.testing
from checks import DT, MLP, compare, perturb, rand, seed_after
from tolerance import assert_fp64
from torch import nn

import fastpeft
from fastpeft.base import Plain
from fastpeft.method.alora_alloc import live_parameters
from fastpeft.terms import delta_weight

pytest.importorskip("peft")
from peft_layers import LEADS, assert_equals_peft, assert_exports, moved, peft_lora

IN, OUT, RANK, ALPHA = 13, 11, 4, 5.0


def built(**options):
    layer = moved(fastpeft.AdaptedLinear(IN, OUT, method="alora_alloc", rank=RANK, alpha=ALPHA, dtype=DT, **options))
    return layer, layer.adapter.alora_alloc


def adapted(**options):
    model = MLP()
    fastpeft.adapt(model, "alora_alloc", **(dict(rank=RANK, alpha=ALPHA) | options))
    return perturb(model), model.up.adapter.alora_alloc


# ---- what the layer computes


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("options", [{}, {"capacity": RANK}, {"dropout": 0.3}, {"bias": False, "capacity": 11}], ids=str)
def test_equals_peft_lora_of_the_live_ranks(options, lead):
    """At the start, and after two ranks went and one came; s stays."""
    layer, m = built(**options)
    assert_equals_peft(layer, lambda: (m.A[:RANK], m.B[:, :RANK]), ALPHA, lead, options.get("dropout", 0.0))
    m.close([0, 2])
    m.open(1)
    live = m.gate.nonzero().flatten()
    assert len(live) == 3
    with torch.no_grad():
        m.B.add_(0.3)
    # alpha / r of a LoRA of three ranks is this layer's alpha / RANK
    assert_equals_peft(layer, lambda: (m.A[live], m.B[:, live]), ALPHA * 3 / RANK, lead, options.get("dropout", 0.0))


def test_equals_the_formula():
    layer, m = built()
    m.close([1])
    x, own = rand(2, 5, IN), (m.A, m.B)
    got, want = layer(x), papers.gated(x, layer.weight, layer.bias, m.A, m.B, m.gate.to(DT), ALPHA / RANK)
    named = dict(zip("xAB", (x, *own), strict=True))
    compare(got, want, named, named)


@pytest.mark.parametrize("dtype", [torch.float32, DT])
def test_with_every_gate_on_it_is_lora_bit_for_bit(dtype):
    """Start, output and gradients."""
    layers = []
    for method, more in (("lora", {}), ("alora_alloc", {"capacity": RANK})):
        torch.manual_seed(5)
        layer = fastpeft.AdaptedLinear(IN, OUT, method=method, rank=RANK, alpha=ALPHA, dtype=dtype, **more)
        layers.append((layer, layer.adapter.get_submodule(method)))
    (first, a), (second, b) = layers
    with torch.no_grad():
        b.B.copy_(a.B.normal_())
    x = torch.randn(9, IN, dtype=dtype)
    y, z = first(x), second(x)
    assert torch.equal(y, z) and torch.equal(a.A, b.A)
    for p, q in zip(torch.autograd.grad(y.square().sum(), (a.A, a.B)), torch.autograd.grad(z.square().sum(), (b.A, b.B)), strict=True):
        assert torch.equal(p, q)


def test_start_and_counts():
    layer = fastpeft.AdaptedLinear(300, 200, method="alora_alloc")
    m = layer.adapter.alora_alloc
    assert not any(delta_weight(t).any() for t in m.terms(None))
    assert m.A.shape == (16, 300) and m.B.shape == (200, 16) and m.scale == 1.0
    assert m.gate.tolist() == [True] * 8 + [False] * 8 and not m.gate.requires_grad
    assert 0.9 < m.A[:8].abs().max() * 300**0.5 <= 1 and not m.A[8:].any() and not m.B.any()
    assert m.live() == 8 and live_parameters(layer) == 8 * 500
    assert set(m.state_dict()) == {"A", "B", "gate"}
    narrow = fastpeft.AdaptedLinear(300, 10, method="alora_alloc").adapter.alora_alloc
    assert narrow.A.shape[0] == 10 and narrow.live() == 8, "the default capacity fits the layer"


class Block(nn.Module):
    """The linears of a LLaMA-2-7B block."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(4096, 4096, bias=False))
        self.gate_proj, self.up_proj = (nn.Linear(4096, 11008, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(11008, 4096, bias=False)


def test_live_parameters_of_llama_2_7b():
    """The paper's 20.0M: 8 ranks on seven linears of 32 blocks; on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        model = nn.ModuleList(Block() for _ in range(32))
    report = fastpeft.adapt(model, "alora_alloc", rank=8)
    assert len(report.adapted) == 224 and live_parameters(model) == 19_988_480
    assert report.trainable == 2 * 19_988_480, "the report counts what is allocated"
    fastpeft.unload(model)
    assert fastpeft.adapt(model, "alora_alloc", rank=8, capacity=8).trainable == 19_988_480


# ---- ranks that go and come


def test_closing_removes_the_rank_and_opening_changes_no_output():
    layer, m = built()
    x, A, B = rand(5, IN), m.A, m.B
    with torch.no_grad():
        kept = m.A[[0, 2]].clone(), m.B[:, [0, 2]].clone()
    m.close([3, 1])
    want = layer(x)
    assert_fp64(want, peft_lora(layer, *kept, ALPHA / 2)(x))
    assert m.A is A and m.B is B and not m.A[[1, 3]].any() and not m.B[:, [1, 3]].any() and m.live() == 2
    assert m.open(3) == [1, 3, 4] and m.live() == 5
    assert torch.equal(layer(x), want)
    fresh = m.A[[1, 3, 4]]
    assert fresh.abs().max() <= IN**-0.5 and fresh.abs().min() > 0 and not m.B[:, [1, 3, 4]].any()
    assert torch.equal(m.A[[0, 2]], kept[0]) and torch.equal(m.B[:, [0, 2]], kept[1])
    layer(x).square().sum().backward()
    assert all(m.B.grad[:, i].any() for i in range(5)) and not m.B.grad[:, 5:].any() and not m.A.grad[5:].any()


def test_every_process_draws_the_same_new_ranks():
    rows = []
    for _ in range(2):
        _, m = built()
        m.open(2, generator=torch.Generator().manual_seed(3))
        rows.append(m.A[RANK : RANK + 2].clone())
    assert torch.equal(*rows)


@pytest.mark.parametrize("options", [dict(weight_decay=0.1), dict(amsgrad=True)], ids=str)
@pytest.mark.parametrize("told", [True, False])
def test_a_closed_rank_stays_at_zero_if_the_optimizer_forgets_it(told, options):
    layer, m = built()
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.1, **options)

    def step():
        optimizer.zero_grad()
        layer(torch.randn(9, IN, dtype=DT)).square().sum().backward()
        optimizer.step()

    step()
    m.close([1], optimizer.state if told else None)
    other = optimizer.state[m.A]["exp_avg"][0].clone()
    for _ in range(3):
        step()
    zero = not m.A[1].any() and not m.B[:, 1].any()
    assert zero == told, "without that, momentum moves it"
    assert other.any() and m.A[0].any()
    with torch.no_grad():
        m.gate[1] = False
    m.open(1, optimizer.state if told else None)
    assert not m.B[:, 1].any() and (not optimizer.state[m.B]["exp_avg"][:, 1].any()) == told


def test_a_trained_model_opens_and_closes_in_one_graph():
    model, m = adapted()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.train(), backend=graphs, fullgraph=True)
    x = rand(5, 16)
    for change in (lambda: None, lambda: m.close([0]), lambda: m.close([3]), lambda: m.open(2), lambda: m.open(1)):
        change()
        assert_fp64(compiled(x), model(x))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(("closed", "opened"), [([], 0), ([1, 2], 0), ([0], 3), ([0, 1, 2, 3], 0)], ids=str)
def test_merge_and_export_take_the_live_ranks(closed, opened, tmp_path):
    plain, x = MLP(), rand(5, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "alora_alloc", rank=RANK, alpha=ALPHA)
    m = perturb(model).eval().up.adapter.alora_alloc
    m.close(closed)
    m.open(opened)
    with torch.no_grad():
        m.B.add_(0.2)  # the spare columns too: they must not count
    live = RANK - len(closed) + opened
    (term,) = m.static_terms(Plain(model.up.weight))
    assert term.A.shape[0] == term.B.shape[1] == live and term.scale == ALPHA / RANK
    assert_exports(model, plain, tmp_path, x, max(1, live), RANK)


def test_the_gate_travels_with_folders_and_state_dicts(tmp_path):
    model, m = adapted()
    m.close([0, 1])
    m.open(1)
    m.close([3])
    x = rand(5, 16)
    want = model.eval()(x)
    fastpeft.save_adapter(model, tmp_path)
    plain = MLP()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapter." not in k})
    fastpeft.load_adapter(plain.eval(), tmp_path)
    other, _ = adapted()
    other.load_state_dict(model.state_dict())
    for loaded in (plain, other.eval()):
        gate = loaded.up.adapter.alora_alloc.gate
        assert gate.tolist() == m.gate.tolist() == [True, False, True, False, False, False, False, False]
        assert torch.equal(loaded(x), want) and live_parameters(loaded) == (2 + RANK) * 48


def test_gates_survive_a_cast():
    layer, m = built()
    m.close([0])
    assert layer.to(torch.bfloat16).adapter.alora_alloc.gate.dtype is torch.bool and m.live() == RANK - 1


def test_a_change_between_forward_and_backward_is_refused():
    layer, m = built()
    y = layer(rand(9, IN))
    m.close([0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_mask_of_dropout_is_not_touched():
    """One seed, one mask: spare ranks draw nothing."""
    layer, m = built(dropout=0.4)
    x = rand(5, IN)
    seed_after(3)
    want = layer(x)
    m.open(2)
    seed_after(3)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda m: m.close([4]), ValueError, r"close: ranks=\[4\] at 'linear'; live ranks are \[0, 1, 2, 3\]"),
    (lambda m: m.close([0, 0]), ValueError, r"ranks=\[0, 0\].*at most once"),
    (lambda m: m.close([-1]), ValueError, r"ranks=\[-1\]"),
    (lambda m: m.open(5), ValueError, r"alora_alloc.open: count=5 at 'linear'.*0 to 4, the spare ranks"),
    (lambda m: m.open(-1), ValueError, r"count=-1"),
    (lambda m: m.open(1.0), TypeError, r"count=1.0"),
])  # fmt: skip
def test_calls_that_do_not_fit_change_nothing(call, error, words):
    _, m = built()
    before = copy.deepcopy(m.state_dict())
    with pytest.raises(error, match=words):
        call(m)
    assert all(torch.equal(t, before[k]) for k, t in m.state_dict().items())


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(rank=0), ValueError, r"alora_alloc: rank=0 at 'linear'.*1 to 11"),
    (dict(rank=4, capacity=3), ValueError, r"alora_alloc: capacity=3 at 'linear'.*4 to 11.*from the rank"),
    (dict(rank=4, capacity=12), ValueError, r"capacity=12"),
    (dict(capacity=8.0), TypeError, r"capacity=8.0"),
    (dict(alpha=float("nan")), ValueError, r"alora_alloc: alpha=nan.*finite"),
    (dict(dropout=-1), ValueError, r"alora_alloc: dropout=-1"),
])  # fmt: skip
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "alora_alloc", **options)
