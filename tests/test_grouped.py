"""Grouped experts against the token-by-token formula in fp64: values, every gradient, empty groups, memory, dtypes, errors."""

from __future__ import annotations

import itertools

import papers
import pytest
import torch
from checks import DT, rand
from test_memory import saved_bytes
from test_seam import assert_same
from tolerance import assert_as_good

import fastpeft
from fastpeft import grouped as front
from fastpeft.grouped import as_low_rank
from fastpeft.linear import adapted_linear
from fastpeft.ops import grouped, lowrank, steps
from fastpeft.terms import Bias, Gain, Grouped, LowRank, delta_weight, effective_weight, is_linear

IN, OUT, S, SEED = 12, 10, 0.7, torch.tensor(77)
RANKS = {"equal": (3, 3, 3, 3), "unequal": (2, 0, 4, 1)}


def best(k, temperature=None):
    """The k highest scores and their softmax, all of them for k = 0."""

    def choose(p, x):
        scores, index = p.topk(k, -1)
        scores = scores if temperature is None else scores * temperature
        return index, torch.softmax(scores, -1)

    return choose


def problem(ranks=RANKS["unequal"], k=2, lead=(3, 5), dtype=DT):
    """Leaves by name, W, b, and the term that chooses by its rows and a temperature."""
    make = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    R = sum(ranks)
    leaves = {"x": make(*lead, IN), "A": make(R, IN), "B": make(OUT, R), "rows": make(len(ranks), IN)}
    leaves["temperature"] = torch.tensor(0.6, dtype=dtype, requires_grad=True)
    W, b = torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    choose = best(k, leaves["temperature"])
    return leaves, W, b, Grouped(leaves["A"], leaves["B"], ranks, choose, S, leaves["rows"])


def formula(leaves, term, x=None):
    x = leaves["x"] if x is None else x
    index, weight = term.choose(papers.linear(x, leaves["rows"]), x)
    return papers.grouped(x, leaves["A"], leaves["B"], term.ranks, index, weight, S)


def check(ranks=RANKS["unequal"], k=2, lead=(3, 5)):
    leaves, W, b, term = problem(ranks, k, lead)
    assert_same(leaves, adapted_linear(leaves["x"], W, b, [term]), papers.site(leaves["x"], W, b, [formula(leaves, term)]))


@pytest.mark.parametrize("one_pass", [False, True], ids=["base first", "adapter first"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", RANKS)
def test_equals_the_formula_token_by_token(ranks, k, one_pass, monkeypatch):
    monkeypatch.setattr(steps, "ONE_PASS", 0 if one_pass else 1 << 60)
    check(RANKS[ranks], k)


@pytest.mark.parametrize("lead", [(1,), (40,), (2, 1, 3)], ids=str)
def test_leading_dimensions(lead):
    check(lead=lead)


def test_one_dimension():
    leaves, W, b, term = problem(lead=())
    assert_same(leaves, adapted_linear(leaves["x"], W, b, [term]), papers.site(leaves["x"], W, b, [formula(leaves, term)]))


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_gathered_a_few_at_a_time(rows, monkeypatch):
    monkeypatch.setattr(grouped, "CHUNK", rows * IN)
    check(lead=(40,))


@pytest.mark.parametrize("gain_p", [None, 0.0, 0.3])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "W trains"])
def test_beside_other_terms(gain_p, trains):
    """A low-rank term with a middle, one that drops, a gain with and without dropout, a bias, another Grouped."""
    leaves, W, b, term = problem()
    more = {"A2": rand(3, IN), "B2": rand(OUT, 3), "A3": rand(2, IN), "B3": rand(OUT, 2), "bias": rand(OUT)}
    index = torch.randint(0, 2, (3, 5, 1))
    tanh = lambda u, p, x: torch.tanh(u)  # noqa: E731
    terms = [
        term, LowRank(more["A2"], more["B2"], 1.3, mid=tanh), LowRank(more["A3"], more["B3"], 0.4, dropout=0.3),
        Grouped(more["A2"], more["B2"], (1, 2), lambda p, x: (index, None), 0.9), Bias(more["bias"]),
    ]  # fmt: skip
    mask = lambda p: fastpeft.dropout_mask(SEED, leaves["x"].shape, p)  # noqa: E731
    added = [
        formula(leaves, term), papers.low_rank(leaves["x"], more["A2"], more["B2"], 1.3, mid=tanh),
        papers.low_rank(leaves["x"], more["A3"], more["B3"], 0.4, mask(0.3)),
        papers.grouped(leaves["x"], more["A2"], more["B2"], (1, 2), index, torch.ones(3, 5, 1, dtype=DT), 0.9),
    ]  # fmt: skip
    g = None
    if gain_p is not None:
        g = more["g"] = rand(OUT)
        terms.append(Gain(g, dropout=gain_p))
    if trains:
        more |= {"W": W.requires_grad_(), "b": b.requires_grad_()}
    want = papers.site(leaves["x"], W, b, added, g, mask(gain_p) if gain_p else None, [more["bias"]])
    assert_same(leaves | more, adapted_linear(leaves["x"], W, b, terms, seed=SEED), want)


@pytest.mark.parametrize("needed", ["x", "A", "B", "rows", "temperature"])
def test_one_gradient_alone(needed):
    leaves, W, b, term = problem()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == needed)
    got, want = adapted_linear(leaves["x"], W, b, [term]), papers.site(leaves["x"], W, b, [formula(leaves, term)])
    assert_same({needed: leaves[needed]}, got, want)


FIXED = {
    "one expert without a token": torch.tensor([[0, 3]] * 6),
    "all tokens on one": torch.tensor([[2]] * 6),
    "all on one of rank 0": torch.tensor([[1]] * 6),
    "one expert twice": torch.tensor([[2, 2]] * 3 + [[0, 0]] * 3),
    "every expert": torch.tensor([[3, 1, 0, 2]] * 6),
    "each its own": torch.tensor([[0], [3], [2], [2], [0], [3]]),
}


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("weighted", [False, True])
def test_who_uses_whom(name, weighted):
    """An index from elsewhere, and weights that are leaves, or none, which is 1."""
    leaves, W, b, term = problem(lead=(6,))
    index = FIXED[name]
    w = rand(*index.shape)
    term.choose, term.rows = (lambda p, x: (index, w if weighted else None)), None
    own = {n: leaves[n] for n in "xAB"} | ({"w": w} if weighted else {})
    ones = torch.ones_like(w)
    want = papers.site(leaves["x"], W, b, [papers.grouped(leaves["x"], leaves["A"], leaves["B"], term.ranks, index, w if weighted else ones, S)])
    assert_same(own, adapted_linear(leaves["x"], W, b, [term]), want)


def test_all_tokens_on_one_expert_gathers_nothing(monkeypatch):
    leaves, W, b, term = problem(lead=(6,))
    term.choose, term.rows = (lambda p, x: (FIXED["all tokens on one"], None)), None
    real = grouped._rows
    monkeypatch.setattr(grouped, "_rows", lambda t, tokens: real(t, tokens) if tokens is None else pytest.fail("gathered"))
    adapted_linear(leaves["x"], W, b, [term]).sum().backward()


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_empty_batch(lead):
    leaves, W, b, term = problem(lead=lead)
    y = adapted_linear(leaves["x"], W, b, [term])
    assert y.shape == (*lead, OUT)
    y.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("gain", [False, True])
def test_gradcheck(gain):
    leaves, W, b, term = problem(lead=(4,))
    terms = [term, Gain(rand(OUT))] if gain else [term]
    more = [t.g for t in terms[1:]]
    assert torch.autograd.gradcheck(lambda *_: adapted_linear(leaves["x"], W, b, terms), (*leaves.values(), *more))


def test_equal_bits_of_two_runs():
    leaves, W, b, term = problem(k=3, lead=(200,), dtype=torch.float32)
    runs = []
    for _ in range(2):
        y = adapted_linear(leaves["x"], W, b, [term])
        runs.append([y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_pairs_are_sorted_by_expert_and_place():
    """A token is once in a segment, tokens ascend, and an index outside belongs to nobody."""
    index = torch.tensor([[2, 0], [0, 2], [2, 7], [-1, 2]])
    order, ends = grouped.segments(index, 3)
    assert ends.dtype is torch.int32 and sorted(order.tolist()) == list(range(8))
    found = [order[a:b].tolist() for a, b in itertools.pairwise(ends)]
    assert found == [[2], [1], [], [], [0, 4], [3, 7], [6], [5]]


def test_what_is_kept_for_backward():
    """x, the sorted pairs and the weights: no number per token and rank, none per token and output."""
    leaves, W, b, term = problem(ranks=(8,) * 4, lead=(512,))
    index, w = torch.randint(0, 4, (512, 2)), rand(512, 2)
    term.choose, term.rows = (lambda p, x: (index, w)), None
    kept = saved_bytes(lambda: adapted_linear(leaves["x"], W, b, [term]))
    own = [leaves["x"], leaves["A"], leaves["B"], w]
    assert kept == sum(t.numel() * 8 for t in own) + index.numel() * 8 + 4 * (5 * 2 + 1)


@pytest.mark.parametrize("small", [1 << 15, 0], ids=["torch", "c++"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16 factors", "autocast"])
def test_dtypes_as_good_as_plain_pytorch(kind, small, monkeypatch):
    """A bf16 base with fp32 factors gets sums in fp32; the choice is given, so that no rounding makes another one."""
    monkeypatch.setattr(lowrank.cpu, "SMALL", small)
    low = torch.float32 if kind == "fp32" else torch.bfloat16
    base, factor = (low, torch.float32 if kind == "bf16" else low) if kind != "autocast" else (torch.float32,) * 2
    ranks, size, out, t = (4, 8, 4), 48, 40, 96
    index = torch.randint(0, 3, (t, 2))
    start = {"x": torch.randn(t, size).to(base), "A": (torch.randn(16, size) / 7).to(factor), "B": (torch.randn(out, 16) / 2).to(factor)}
    start["w"] = torch.rand(t, 2)
    W, d = (torch.randn(out, size) / 7).to(base), torch.randn(t, out).to(low)
    runs = []
    for how in ("ours", "exact", "plain"):
        to = {"ours": None, "exact": DT, "plain": low if kind.startswith("bf16") else None}[how]
        own = {n: v.to(to or v.dtype).requires_grad_() for n, v in start.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast" and how != "exact"):
            if how == "ours":
                y = adapted_linear(own["x"], W, None, [Grouped(own["A"], own["B"], ranks, lambda p, x, o=own: (index, o["w"]), S)])
            else:
                y = own["x"] @ W.to(own["x"].dtype).T + papers.grouped(own["x"], own["A"], own["B"], ranks, index, own["w"], S)
        runs.append([y.detach(), *torch.autograd.grad(y, list(own.values()), d.to(y.dtype))])
    for name, got, exact, plain in zip(("y", *start), *runs, strict=True):
        assert_as_good(got.to(plain.dtype), exact, plain, f"{name}, {kind}")
    assert runs[0][2].dtype is factor


def test_choose_runs_under_the_callers_autocast():
    leaves, W, b, term = problem(dtype=torch.float32)
    seen = []
    choose = term.choose
    term.choose = lambda p, x: (seen.append((torch.is_autocast_enabled("cpu"), p.dtype, x.dtype)), choose(p, x))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted_linear(leaves["x"], W, b, [term]).dtype is torch.bfloat16
    adapted_linear(leaves["x"], W, b, [term])
    assert seen == [(True, torch.bfloat16, torch.float32), (False, torch.float32, torch.float32)]


def test_compiled_code_computes_all_experts(monkeypatch):
    """One graph, of the equal LowRank: nothing of the grouped code is in it."""
    leaves, W, b, term = problem()
    want = adapted_linear(leaves["x"], W, b, [term])
    monkeypatch.setattr(grouped, "segments", lambda *a: pytest.fail("sorted"))
    run = torch.compile(lambda x: adapted_linear(x, W, b, [term]), backend="aot_eager", fullgraph=True)
    assert_same(leaves, run(leaves["x"]), want)


@pytest.mark.parametrize("weighted", [True, False])
def test_as_low_rank_is_the_same_sum(weighted):
    leaves, W, b, term = problem(k=2)
    if not weighted:
        term.choose = lambda p, x: (p.topk(2, -1)[1], None)
    own = {n: leaf for n, leaf in leaves.items() if weighted or n in "xAB"}
    assert_same(own, adapted_linear(leaves["x"], W, b, [term]), adapted_linear(leaves["x"], W, b, [as_low_rank(term)]))


def test_no_single_weight_stands_for_it():
    *_, term = problem()
    assert not is_linear([term])
    for call in (lambda: effective_weight(torch.zeros(OUT, IN), [term]), lambda: delta_weight(term)):
        with pytest.raises(ValueError, match=r"token-dependent part.*`choose`"):
            call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": (2, 3)}, r"A is \(7, 12\) and B is \(10, 7\) of experts with ranks \(2, 3\); needed are .*\(5, 12\)"),
        ({"ranks": ()}, r"ranks is \(\)"),
        ({"ranks": (8, -1)}, r"one int of at least 0"),
        ({"rows": torch.zeros(4, IN + 1)}, r"rows is \(4, 13\); it must be \[P, in\]"),
        ({"choose": lambda p, x: (torch.zeros(3, 5), None)}, r"index of torch.float32 \(3, 5\)"),
        ({"choose": lambda p, x: (torch.zeros(3, 4, 2).long(), None)}, r"with x's leading dimensions"),
        ({"choose": lambda p, x: (torch.zeros(3, 5, 0).long(), None)}, r"k >= 1"),
        ({"choose": lambda p, x: (torch.zeros(3, 5, 2).long(), torch.ones(3, 5, 1))}, r"weight of torch.float32 \(3, 5, 1\)"),
        ({"choose": lambda p, x: (torch.zeros(3, 5, 2).long(), torch.ones(3, 5, 2).long())}, r"a float for each"),
        ({"choose": lambda p, x: (torch.full((3, 5, 1), 4), None)}, r"experts 4 to 4; there are 4, numbered from 0"),
        ({"choose": lambda p, x: (torch.full((3, 5, 1), -1), None)}, r"experts -1 to -1"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v[:24],
)
def test_errors(change, words):
    leaves, W, b, term = problem()
    for name, value in change.items():
        setattr(term, name, value)
    with pytest.raises(ValueError, match=words):
        adapted_linear(leaves["x"], W, b, [term])


# planted faults


def weight_forgotten(m):
    m.setattr(grouped, "_weight", lambda w, pairs: None)


def weights_of_the_sorted_order(m):
    m.setattr(grouped, "_weight", lambda w, pairs: w[0][: len(pairs), None] if w else None)


def weight_twice(m):
    real = grouped._times
    m.setattr(grouped, "_times", lambda u, w: real(real(u, w), w))


def tokens_of_other_pairs(m):
    real = grouped._rows
    m.setattr(grouped, "_rows", lambda t, tokens: real(t, tokens if tokens is None or t.dim() == 1 else tokens.flip(0)))


def places_mixed_up(m):
    real = grouped.segments
    m.setattr(grouped, "segments", lambda index, n: real(index.flip(-1), n))


def last_expert_dropped(m):
    real = grouped.Family._runs
    m.setattr(grouped.Family, "_runs", lambda self, *a: [*real(self, *a)][:-1])


def ranks_shifted(m):
    real = grouped.Family.__init__
    m.setattr(grouped.Family, "__init__", lambda self, ranks, k: real(self, (*ranks[1:], ranks[0]), k))


def scale_forgotten_in_backward(m):
    real = lowrank.du_db
    m.setattr(lowrank, "du_db", lambda dz, v, B, scale, blocks, **how: real(dz, v, B, 1.0, blocks, **how))


def scale_forgotten_in_forward(m):
    real = lowrank.up
    m.setattr(lowrank, "up", lambda v, B, scale, blocks, bias: real(v, B, 1.0, blocks, bias))


def written_and_not_added(m):
    m.setattr(torch.Tensor, "index_add_", lambda self, d, i, v: self.index_copy_(d, i, v))


def rows_without_a_gradient(m):
    real = front.probe
    m.setattr(front, "probe", lambda x, rows, *a: real(x, rows.detach(), *a) + 0 * rows.sum())


def x_without_the_routers_gradient(m):
    real = front.probe
    m.setattr(front, "probe", lambda x, *a: real(x.detach(), *a))


FAULTS = [
    weight_forgotten, weights_of_the_sorted_order, weight_twice, tokens_of_other_pairs, places_mixed_up, last_expert_dropped,
    ranks_shifted, scale_forgotten_in_backward, scale_forgotten_in_forward, written_and_not_added, rows_without_a_gradient,
    x_without_the_routers_gradient,
]  # fmt: skip


@pytest.mark.parametrize("plant", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_found(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="differs by"):
        check(ranks=(3, 2, 4, 1))
