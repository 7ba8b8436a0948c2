"""SuperLoRA: the dense formula, its special cases against their oracles, Fastfood against a dense matrix, counts and limits."""

from __future__ import annotations

import copy
import math

import papers
import pytest
import torch
from checks import DT, MLP, perturb, rand
from test_loha import compare, double
from test_memory import saved_bytes
from tolerance import assert_as_good, assert_fp64
from torch import nn

import fastpeft
from fastpeft import fastfood, fold
from fastpeft.base import Plain
from fastpeft.method.superlora import SuperLoRA
from fastpeft.terms import Composed, Dense, Kron, LowRank, delta_weight

IN, OUT, RANK = 12, 18, 2
SIDES = dict(groups="layer", fold="matrix")


def built(into=IN, out=OUT, method="superlora", **options):
    """(layer, its SuperLoRA), every factor and core away from its start."""
    layer = fastpeft.AdaptedLinear(into, out, method=method, dtype=DT, **({"rank": RANK} | options))
    return perturb(layer, 1.0), layer.adapter.get_submodule(method)


def parts_of(m, holder, group=0):
    """Of a group, its splits as papers has them: (factors, core or None) each."""
    own = m if holder is None else holder
    layout = m.layout if holder is None else holder.layout
    splits, order = len(layout.groups[group].sizes), layout.order
    at = sum(len(g.sizes) for g in layout.groups[:group])
    factors, cores = list(own.factors), list(own.cores) or None
    return [(factors[(at + k) * order : (at + k + 1) * order], cores[at + k] if cores else None) for k in range(splits)]


def oracle(m, holder):
    """The vector of all updates, group by group from papers."""
    layout, made = (m if holder is None else holder).layout, []
    for n, g in enumerate(layout.groups):
        P = order = None
        device = torch.device("cpu")
        if g.kept < g.length:
            size = 1 << (g.length - 1).bit_length()
            P = papers.fastfood(*fastfood.draws(g.key, size, device), g.length, g.kept)
        if g.shuffle:
            order = fastfood.permutation(g.key, g.length, 2, device)
        made.append(papers.superlora_group(parts_of(m, holder, n), g.length, g.kept, P, order))
    return torch.cat(made)


# ---- values and gradients of one layer

FOLDS = [
    dict(order=2), dict(order=3), dict(order=4), dict(order=2, core="cp"), dict(order=3, core="cp"),
    dict(order=2, splits=2), dict(order=3, splits=2, core="cp"), dict(order=2, splits=3), dict(order=3, splits=2),
    dict(order=3, groups=5), dict(order=3, rho=0.3), dict(order=2, rho=0.5, shuffle=True, groups=2), dict(shuffle=True),
    dict(order=3, groups="layer"), dict(order=2, groups="layer", rho=0.4, seed=3, shuffle=True), dict(order=2, splits=2, core="cp", rho=0.7),
    dict(order=2, core="cp", **SIDES), dict(order=3, **SIDES), dict(order=4, **SIDES), dict(order=3, core="cp", **SIDES),
    dict(order=5, core="cp", **SIDES), dict(order=2, splits=2, **SIDES), dict(order=2, splits=3, core="cp", **SIDES),
    dict(order=4, splits=2, **SIDES),
]  # fmt: skip


@pytest.mark.parametrize("options", FOLDS, ids=str)
def test_equals_the_dense_formula(options):
    for alpha in (None, 3.0):
        layer, m = built(alpha=alpha, **options)
        x, s = rand(2, 3, IN), 1.0 if alpha is None else alpha / RANK
        delta = oracle(m, m.holder).view(OUT, IN)
        own = {n: p for n, p in layer.named_parameters() if p.requires_grad} | {"x": x}
        want = papers.linear(x, layer.weight + s * delta, layer.bias)
        assert (want - papers.linear(x, layer.weight, layer.bias)).abs().max() > 1e-2, "the adapter does nothing"
        compare(layer(x), want, own, own)
        (term,) = m.terms(Plain(layer.weight))
        assert_fp64(delta_weight(term, DT), (s * delta).detach(), "delta_weight")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (dict(), Dense),
        (dict(order=3, **SIDES), LowRank),
        (dict(order=4, core="cp", **SIDES), LowRank),
        (dict(order=2, splits=2, **SIDES), Kron),
        (dict(order=2, splits=4, core="cp", **SIDES), Kron),
        (dict(order=4, splits=2, **SIDES), Dense),
        (dict(fold="stack"), LowRank),
    ],
    ids=str,
)
def test_sides_apart_are_never_materialised(options, kind):
    layer, m = built(**options)
    (term,) = m.terms(Plain(layer.weight))
    assert type(term) is kind
    if kind is LowRank:
        cp = options.get("core") == "cp"
        assert term.A.shape[0] == RANK ** (1 if cp else options.get("order", 2) // 2)
    if kind is Dense:
        assert isinstance(term.delta, Composed)


# ---- several layers in one vector


def pair(**options):
    """An MLP whose two layers, of 16 x 32 numbers each, are one vector."""
    model = MLP()
    fastpeft.adapt(model, "superlora", **({"rank": RANK, "alpha": 3.0} | options))
    return perturb(model)


def dense(model, x):
    """The MLP with the oracle's cut of the vector added to its weights."""
    m = model.up.adapter.superlora
    vector = oracle(m, m.holder) * (3.0 / RANK)
    W = {}
    for n in ("up", "down"):
        start, out, into = m.holder.layout.spans[n]
        W[n] = model.get_submodule(n).weight + vector[start : start + out * into].view(out, into)
    h = torch.tanh(papers.linear(x, W["up"], model.up.bias))
    return papers.linear(h, W["down"], model.down.bias)


ACROSS = [dict(), dict(groups=3), dict(groups=7, order=2), dict(order=4, splits=2, core="cp"), dict(rho=0.3), dict(rho=0.6, shuffle=True, groups=3)]


@pytest.mark.parametrize("options", ACROSS, ids=str)
def test_layers_are_cut_from_one_vector(options):
    model, x = pair(**options), rand(5, 16)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.startswith("adapter_shared.superlora_rank2.") for n in own)
    compare(model(x), dense(model, x), own | {"x": x}, own | {"x": x})
    for micro in (x[:2], x[2:]):  # two micro-batches
        model(micro).square().sum().backward()
    want = torch.autograd.grad(dense(model, x).square().sum(), list(own.values()))
    for (n, p), g in zip(own.items(), want, strict=True):
        assert_fp64(p.grad, g, n)


def test_groups_cover_the_vector_and_one_layer_may_need_several():
    holder = pair(groups=3).up.adapter.superlora.holder
    spans = [(g.start, g.length) for g in holder.layout.groups]
    assert spans == [(0, 341), (341, 341), (682, 342)] and holder.layout.spans["down"] == (512, 16, 32)


def test_ranks_and_alphas_by_pattern():
    model, x = MLP(), rand(4, 16)
    fastpeft.adapt(model, "superlora", rank=2, alpha=3.0, rank_pattern={"down": 1}, alpha_pattern={"down": 5.0})
    perturb(model)
    up, down = model.up.adapter.superlora, model.down.adapter.superlora
    assert set(model.adapter_shared) == {"superlora_rank2", "superlora_rank1"} and up.holder is not down.holder
    W = {n: model.get_submodule(n).weight + s * oracle(m, m.holder).view(m.holder.layout.spans[n][1:])
         for n, m, s in (("up", up, 1.5), ("down", down, 5.0))}  # fmt: skip
    want = papers.linear(torch.tanh(papers.linear(x, W["up"], model.up.bias)), W["down"], model.down.bias)
    assert_fp64(model(x), want)


# ---- special cases


def test_order_two_with_sides_apart_is_peft_lora():
    pytest.importorskip("peft")
    from peft_layers import LEADS, assert_equals_peft

    for lead in LEADS:
        layer, m = built(order=2, core="cp", alpha=5.0, **SIDES)
        assert [tuple(p.shape) for p in m.parameters()] == [(OUT, RANK), (IN, RANK)]
        assert_equals_peft(layer.train(), lambda m=m: (m.factors[1].T, m.factors[0]), 5.0, lead)


@pytest.mark.parametrize(("into", "out", "rank"), [(12, 18, 1), (64, 100, 3), (49, 36, 2)])
def test_two_splits_with_sides_apart_are_peft_lokr(into, out, rank):
    pytest.importorskip("peft")
    from test_lokr import stock

    layer, m = built(into, out, rank=rank, alpha=7.0, order=2, splits=2, core="cp", **SIDES)
    twin = fastpeft.AdaptedLinear(into, out, method="lokr", dtype=DT, rank=rank, alpha=7.0, decompose_both=True)
    lokr = twin.adapter.lokr
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")}, strict=False)
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    with torch.no_grad():
        for n, p in zip(names, m.factors, strict=True):
            getattr(lokr, n).copy_(p.T if n.endswith("b") else p)
    theirs, live = stock(twin, r=rank, alpha=7.0, decompose_both=True)
    x = rand(5, into)
    with double():
        y, z = layer(x), theirs(x)
        assert_fp64(y, z, "y")
        d = torch.randn_like(y)
        got = torch.autograd.grad(y, (x, *m.factors), d)
        want = torch.autograd.grad(z, (x, *(live[n] for n in names)), d)
    for n, g, w in zip(("x", *names), got, want, strict=True):
        assert_fp64(g, w.T if n.endswith("b") else w, n)


def test_lonkr_is_a_product_of_three():
    layer, m = built(24, 30, method="lonkr")
    T = [a @ b.T for a, b in zip(m.factors[::2], m.factors[1::2], strict=True)]
    assert len(T) == 3 and all(min(t.shape) > 1 for t in T)
    x, W = rand(4, 24), layer.weight + papers.kron(papers.kron(T[0], T[1]), T[2])
    assert_fp64(layer(x), papers.linear(x, W, layer.bias))


def test_lorta_is_a_tensor_of_order_three():
    layer, m = built(method="lorta")
    (a, b, c), core = m.factors, m.cores[0]
    assert (a.shape, b.shape, c.shape) == ((OUT, RANK), (3, RANK), (4, RANK))
    delta = torch.einsum("ou,iv,jw,uvw->oij", a, b, c, core).reshape(OUT, IN)
    x = rand(4, IN)
    assert_fp64(layer(x), papers.linear(x, layer.weight + delta, layer.bias))


def test_near_square_matrix_is_reshaped():
    layer, m = built(order=2, core="cp")
    assert [tuple(p.shape) for p in m.holder.factors] == [(12, RANK), (18, RANK)]
    x, delta = rand(4, IN), (m.holder.factors[0] @ m.holder.factors[1].T).reshape(OUT, IN)
    assert_fp64(layer(x), papers.linear(x, layer.weight + delta, layer.bias))


def test_the_stack_is_lotr():
    plain = nn.Module()
    plain.a, plain.b, plain.c = nn.Linear(IN, OUT, dtype=DT), nn.Linear(IN, OUT, dtype=DT), nn.Linear(OUT, IN, dtype=DT)
    ours, theirs, x = copy.deepcopy(plain), plain, rand(3, IN)
    report = fastpeft.adapt(ours, "superlora", fold="stack", rank=RANK, alpha=3.0)
    assert {k: n for k, (n, _) in report.shared.items()} == {
        f"adapter_shared.superlora_{OUT}x{IN}_rank2": 2, f"adapter_shared.superlora_{IN}x{OUT}_rank2": 1,
    }  # fmt: skip
    assert report.trainable == fastpeft.adapt(theirs, "lotr", rank=RANK, alpha=3.0).trainable == 4 * (IN + OUT) + 3 * RANK**2
    perturb(ours)
    with torch.no_grad():
        for n in "abc":
            mine, lotr = ours.get_submodule(n).adapter.superlora, theirs.get_submodule(n).adapter.lotr
            lotr.holder.L.copy_(mine.holder.factors[0])
            lotr.holder.R.copy_(mine.holder.factors[1].T)
            lotr.M.copy_(mine.holder.cores[0][:, mine.holder.places[n]])
    mine, lotr = ours.a.adapter.superlora.holder, theirs.a.adapter.lotr.holder
    got, want = (m.a(x).square().sum() + m.b(x).square().sum() for m in (ours, theirs))
    assert_fp64(got, want)
    core, L, R = torch.autograd.grad(got, (mine.cores[0], *mine.factors))
    own = [theirs.get_submodule(n).adapter.lotr.M for n in "ab"]
    *cores, L2, R2 = torch.autograd.grad(want, (*own, lotr.L, lotr.R))
    for name, g, w in (("core", core, torch.stack(cores, 1)), ("L", L, L2), ("R", R, R2.T)):
        assert_fp64(g, w, name)


# ---- Fastfood


@pytest.mark.parametrize("q", range(11))
def test_walsh_hadamard_is_sylvesters(q):
    n = 2**q
    z = torch.randn(n, dtype=DT)
    assert_fp64(fastfood.walsh_hadamard(z), papers.hadamard(n) @ z / n**0.5)


def test_the_dense_hadamard_matrix_is_scipys():
    scipy = pytest.importorskip("scipy.linalg")
    assert torch.equal(papers.hadamard(64), torch.from_numpy(scipy.hadamard(64)).double())


@pytest.mark.parametrize(("length", "kept"), [(1, 1), (2, 1), (13, 5), (16, 16), (17, 3), (200, 31)])
def test_projected_units_are_columns_of_the_dense_matrix(length, kept):
    key = 0x1234567890ABCDEF
    n = 1 << (length - 1).bit_length()
    P = papers.fastfood(*fastfood.draws(key, n, torch.device("cpu")), length, kept)
    for i in range(kept):
        assert_fp64(fastfood.project(torch.eye(kept, dtype=DT)[i], length, key), P[:, i], f"e_{i}")
    z, y = torch.randn(kept, dtype=DT, requires_grad=True), torch.randn(length, dtype=DT)
    (back,) = torch.autograd.grad(fastfood.project(z, length, key), z, y)
    assert_fp64(back, P.T @ y, "adjoint")


def test_what_is_random_looks_so_and_depends_on_the_key():
    n, device = 1 << 14, torch.device("cpu")
    b, order, g = fastfood.draws(5, n, device)
    assert set(b.tolist()) == {-1.0, 1.0} and torch.equal(order.sort().values, torch.arange(n))
    # six standard deviations of each mean
    assert abs(b.mean()) < 6 / n**0.5 and abs(g.mean()) < 6 / n**0.5 and abs(g.var() - 1) < 6 * (2 / n) ** 0.5
    assert abs((g**4).mean() - 3) < 6 * (96 / n) ** 0.5
    descents = (order[1:] < order[:-1]).double().mean()
    assert abs(descents - 0.5) < 6 * (1 / 12 / n) ** 0.5
    for other in fastfood.draws(6, n, device), fastfood.draws(5 + (1 << 40), n, device):
        # two independent permutations agree at one place on average
        assert (other[1] == order).sum() < 10 and abs((other[0] * b).mean()) < 6 / n**0.5 and abs((other[2] * g).mean()) < 6 / n**0.5
    assert (fastfood.permutation(5, n, 2, device) == order).sum() < 10


PINNED = (
    [-1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0],
    [0, 1, 5, 6, 7, 2, 3, 4],
    [1.001970400145064, 1.235084963899168, 0.017323526981076913, 1.6884513238702543, -0.20871046554337813, -1.3037485175301893,
     0.521164779619667, -0.3299981982569152],
    [1, 3, 4, 5, 0, 2, 7, 6],
)  # fmt: skip


def test_saved_adapters_keep_their_projection():
    """A folder holds the seed alone, so these numbers may never change."""
    b, order, g = fastfood.draws(0x123456789ABCDEF, 8, torch.device("cpu"))
    assert (b.tolist(), order.tolist()) == PINNED[:2]
    assert_fp64(g, torch.tensor(PINNED[2], dtype=DT))
    assert fastfood.permutation(7, 8, 2, torch.device("cpu")).tolist() == PINNED[3]


def test_norms_are_kept_on_average():
    z = torch.randn(100, dtype=DT)
    ratio = sum(fastfood.project(z, 256, key).square().sum() for key in range(200)) / 200 / z.square().sum()
    # the sum of 256 squared products of g and a rotated z varies by about sqrt(2 * 3 / 256) from key to key
    assert abs(ratio - 1) < 6 * (6 / 256 / 200) ** 0.5


def test_groups_and_layers_have_projections_of_their_own():
    holder = pair(groups=4, rho=0.5).up.adapter.superlora.holder
    keys = {g.key for g in holder.layout.groups}
    model = MLP()
    fastpeft.adapt(model, "superlora", groups="layer", rho=0.5)
    keys |= {model.get_submodule(n).adapter.superlora.layout.groups[0].key for n in ("up", "down")}
    keys.add(pair(rho=0.5, seed=1).up.adapter.superlora.holder.layout.groups[0].key)
    assert len(keys) == 7


def test_the_seed_is_the_projection(tmp_path):
    plain, x = MLP(), rand(4, 16)
    model = copy.deepcopy(plain)
    fastpeft.adapt(model, "superlora", rank=2, rho=0.4, shuffle=True, seed=11)
    want = perturb(model)(x)
    fastpeft.save_adapter(model, tmp_path)
    loaded = copy.deepcopy(plain)
    fastpeft.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), want)
    other = copy.deepcopy(plain)
    fastpeft.adapt(other, "superlora", rank=2, rho=0.4, shuffle=True, seed=12)
    with pytest.raises(ValueError, match=r"seed.*11.*12"):
        fastpeft.load_adapter(other, tmp_path)
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(x), want)


# ---- sizes and counts


@pytest.mark.parametrize(("n", "parts", "want"), [(768, 2, (24, 32)), (768, 3, (8, 8, 12)), (7, 2, (1, 7)), (32, 3, (2, 4, 4)), (1, 3, (1, 1, 1))])
def test_divisors(n, parts, want):
    assert fold.divisors(n, parts) == want


@pytest.mark.parametrize(("n", "order", "splits", "want"), [
    (216, 2, 1, ((12, 18),)), (214, 2, 1, ((15, 15),)), (216, 3, 1, ((6, 6, 6),)), (217, 3, 1, ((7, 7, 7),)),
    (216, 2, 2, ((3, 3), (4, 6))), (10**6, 3, 2, ((10, 10, 10), (10, 10, 10))), (1, 3, 2, ((1, 1, 1), (1, 1, 1))),
])  # fmt: skip
def test_vector_sizes(n, order, splits, want):
    assert fold.vector_sizes(n, order, splits) == want
    assert math.prod(d for split in want for d in split) >= n


def test_matrix_sizes_are_exact():
    assert fold.matrix_sizes(18, 12, 3, 1) == ((18, 3, 4),) and fold.matrix_sizes(18, 12, 2, 2) == ((3, 3), (6, 4))
    for out, into, order, splits in ((77, 60, 4, 3), (13, 17, 2, 2), (64, 4096, 5, 2)):
        sizes = fold.matrix_sizes(out, into, order, splits)
        modes = [math.prod(s[m] for s in sizes) for m in range(order)]
        assert math.prod(modes[: order // 2]) == out and math.prod(modes[order // 2 :]) == into


@pytest.mark.parametrize("core", ["tucker", "cp"])
@pytest.mark.parametrize("options", [dict(), dict(order=2, splits=3), dict(order=4, groups=3, rho=0.2), dict(order=3, groups="layer")], ids=str)
def test_parameter_count(core, options):
    model = MLP()
    report = fastpeft.adapt(model, "superlora", rank=3, core=core, **options)
    order, splits, groups = options.get("order", 3), options.get("splits", 1), options.get("groups", 1)
    lengths = [512, 512] if groups == "layer" else [(g + 1) * 1024 // groups - g * 1024 // groups for g in range(groups)]
    want = 0
    for length in lengths:
        n = math.ceil(options.get("rho", 1.0) * length)
        d = fold.vector_sizes(n, order, splits)
        assert math.prod(m for split in d for m in split) >= n
        want += sum(3 * sum(split) for split in d) + (splits * 3**order if core == "tucker" else 0)
    assert report.trainable == want
    if groups != "layer":
        assert report.shared == {"adapter_shared.superlora_rank3": (2, want)} and {r.trainable for r in report.layers.values()} == {0}


# ---- starts


@pytest.mark.parametrize("options", [*FOLDS, dict(fold="stack")], ids=str)
def test_one_object_a_group_starts_at_zero_and_moves(options):
    layer = fastpeft.AdaptedLinear(IN, OUT, method="superlora", dtype=DT, rank=RANK, **options)
    x = rand(50, IN)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    own = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    groups = options.get("groups", 1) if isinstance(options.get("groups"), int) else 1
    zero = [n for n, p in own.items() if not p.any()]
    assert len(zero) == groups and all(("cores" in n) == (options.get("core") != "cp") for n in zero)
    layer(x).square().sum().backward()
    for n, p in own.items():
        assert (p.grad.abs().max() > 0) == (n in zero), n


def test_factors_start_within_the_bound():
    layer = fastpeft.AdaptedLinear(200, 300, method="superlora", rank=4)
    for p in layer.adapter.superlora.holder.factors:
        assert 0.9 / 2 < p.abs().max() <= 1 / 2


# ---- what is kept for backward


@pytest.mark.parametrize("options", [dict(), dict(groups="layer", rho=0.5), dict(order=2, splits=2)], ids=str)
def test_a_layer_keeps_x_and_nothing_composed(options):
    layer, x = fastpeft.AdaptedLinear(64, 48, method="superlora", rank=2, **options), torch.randn(512, 64, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == 512 * 64 * 4


def test_one_composition_keeps_the_updates_and_nothing_between():
    model = MLP(torch.float32)
    fastpeft.adapt(model, "superlora", rank=2, rho=0.5, shuffle=True)
    x = torch.randn(7, 16, requires_grad=True)
    updates = 2 * 16 * 32 * 4
    # x, tanh's output, and the seam's read of it, which is the same storage
    assert saved_bytes(lambda: model(x), model) == updates + (7 * 16 + 7 * 32) * 4


def test_no_more_than_its_stretch_is_composed(monkeypatch):
    model, seen = nn.Module(), []
    for n in range(8):
        model.add_module(f"l{n}", nn.Linear(32, 32, dtype=DT))
    fastpeft.adapt(model, "superlora", rank=2)
    real = fold.tucker
    monkeypatch.setattr(fold, "tucker", lambda *a: seen.append(real(*a)) or seen[-1])
    for n in range(8):
        model.get_submodule(f"l{n}")(torch.randn(2, 32, dtype=DT))
    # modes of 21: rows of 441 numbers, of which a stretch of 1024 touches at most 4
    assert len(seen) == 8 and max(t.numel() for t in seen) <= 4 * 441


def test_composed_in_full_precision_under_autocast():
    for options in (dict(), dict(order=3, **SIDES), dict(order=2, splits=2, **SIDES), dict(fold="stack")):
        layer = fastpeft.AdaptedLinear(IN, OUT, method="superlora", rank=RANK, **options)
        m = perturb(layer).adapter.superlora
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (term,) = m.terms(Plain(layer.weight))
        (want,) = m.terms(Plain(layer.weight))
        if not isinstance(term, Dense):  # which is composed where it is used, inside the seam
            assert torch.equal(delta_weight(term), delta_weight(want))
        x = torch.randn(6, IN)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        exact = nn.functional.linear(x, layer.weight + delta_weight(want), layer.bias).double()
        plain = nn.functional.linear(x.bfloat16(), (layer.weight + delta_weight(want)).bfloat16(), layer.bias.bfloat16())
        assert_as_good(y, exact, plain)


def test_bf16_base():
    """Where W could not take the update without rounding it has a product of its own; factors stay fp32."""
    layer = perturb(fastpeft.AdaptedLinear(IN, OUT, method="superlora", rank=RANK, dtype=torch.bfloat16))
    m = layer.adapter.superlora
    tensors, layout = m.holder.tensors(), m.holder.layout
    assert {t.dtype for t in tensors} == {torch.float32}
    x, d = torch.randn(40, IN).bfloat16().requires_grad_(), torch.randn(40, OUT).bfloat16()

    def run(kind, y, *leaves):
        return dict(zip(("y", "x", *range(len(tensors))), (y.detach(), *torch.autograd.grad(y, leaves, d.to(kind))), strict=True))

    got = run(torch.bfloat16, layer(x), x, *tensors)
    own, x64 = [t.detach().double().requires_grad_() for t in tensors], x.detach().double().requires_grad_()
    W, b = layer.weight.double(), layer.bias.double()
    want = run(DT, nn.functional.linear(x64, W + layout.update("linear", *own), b), x64, *own)
    delta = layout.update("linear", *tensors).bfloat16()
    plain = run(torch.bfloat16, nn.functional.linear(x, layer.weight, layer.bias) + nn.functional.linear(x, delta), x, *tensors)
    for n in want:
        assert_as_good(got[n], want[n], plain[n], str(n))


def test_gradcheck():
    layer, m = built(5, 4, order=2, splits=2, rho=0.5, groups="layer")
    names, x = [n for n, _ in m.named_parameters()], rand(2, 5)

    def f(x, *own):
        return torch.func.functional_call(layer, {f"adapter.superlora.{n}": p for n, p in zip(names, own, strict=True)}, (x,))

    assert torch.autograd.gradcheck(f, (x, *m.parameters()))


# ---- errors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(rank=0), ValueError, r"superlora: rank=0 at 'linear'.*at least 1"),
        (dict(order=1), ValueError, r"order=1.*at least 2"),
        (dict(splits=1.5), TypeError, r"splits=1.5"),
        (dict(groups=0), ValueError, r"groups=0"),
        (dict(groups="weight"), TypeError, r"groups='weight'.*int.*"),
        (dict(groups=IN * OUT + 1), ValueError, r"groups=217.*1 to 216.*numbers of all weights"),
        (dict(core="full"), ValueError, r"core='full'.*tucker, cp"),
        (dict(fold="square"), ValueError, r"fold='square'.*vector, matrix, stack"),
        (dict(rho=0.0), ValueError, r"rho=0.0.*more than 0"),
        (dict(rho=1.5), ValueError, r"rho=1.5.*at most 1"),
        (dict(fold="matrix"), ValueError, r"fold='matrix' with groups=1.*groups='layer'"),
        (dict(shuffle=True, **SIDES), ValueError, r"fold='matrix' with rho=1.0, shuffle=True"),
        (dict(fold="stack", order=2), ValueError, r"fold='stack' takes.*order=3"),
        (dict(alpha=float("inf")), ValueError, r"alpha=inf"),
        (dict(seed=-1), ValueError, r"seed=-1"),
    ],
    ids=str,
)
def test_errors(options, error, words):
    with pytest.raises(error, match=words):
        fastpeft.AdaptedLinear.from_linear(nn.Linear(IN, OUT), "superlora", **options)


def test_only_sides_apart_and_stacks_export(tmp_path):
    x = rand(3, 16)
    for options in (dict(order=3, **SIDES), dict(order=2, splits=2, **SIDES), dict(fold="stack")):
        model = perturb_of(options)
        want = model(x)
        plain = fastpeft.unload(copy.deepcopy(model))
        fastpeft.export_lora(model, tmp_path)
        fastpeft.load_adapter(plain, tmp_path)
        assert_fp64(plain(x), want, str(options))
    with pytest.raises(ValueError, match=r"'up' has a Dense term"):
        fastpeft.export_lora(perturb_of(dict()), tmp_path / "no")
    assert SuperLoRA.PEFT is None


def perturb_of(options):
    model = MLP()
    fastpeft.adapt(model, "superlora", rank=2, **options)
    return perturb(model)
