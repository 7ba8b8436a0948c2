"""The Hadamard kernels in Triton's interpreter; run by test_interpreter.py in a process of its own.

fp32 and fp16 only: the interpreter's tl.dot multiplies the bit patterns of bf16. Every buffer is filled with NaN first.
Oracle: the dense product with (b1 a1) * (b2 a2) in fp64, and its autograd. Yardstick: the low-rank composition in PyTorch.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from interpreted_lowrank import F16, F32, LAYOUTS, filled, lay
from thinned import thinned
from tolerance import assert_as_good

from fastpeft.ops import khatri_rao_triton as ops
from fastpeft.ops.launch import interpreting, kernels

hadamard = kernels("hadamard")
lowrank = hadamard.lowrank
SCALE = 0.37

# tokens, in, out: ragged; several tiles of each; for ranks of many rank tiles
SHAPES = [(33, 40, 35), (70, 150, 130), (9, 12, 10)]
RANKS = [1, 3, 4, 5, 8, 12, 16, 20, 32]
DTYPES = [(F32, F32), (F16, F16), (F16, F32)]
NAMES = "a1 a2 b1 b2".split()


def _cases():
    """(shape, rank, (dtype of x, dtype of factors), layout): all ranks; then all dtypes and layouts; then several tiles."""
    for n, (r, dtypes) in enumerate(itertools.product(RANKS, (DTYPES[0], DTYPES[2]))):
        yield SHAPES[0 if r < 12 else 2], r, dtypes, LAYOUTS[n % 3]
    for dtypes, layout in itertools.product(DTYPES, LAYOUTS):
        yield SHAPES[0], 3, dtypes, layout
    for r, dtypes in ((3, DTYPES[0]), (3, DTYPES[2]), (12, DTYPES[2])):
        yield SHAPES[1], r, dtypes, "plain"


def _name(case):
    shape, r, (x, factor), layout = case
    return f"{'x'.join(map(str, shape))}-r{r}-{str(x)[6:]}-{str(factor)[6:]}-{layout}"


cases = pytest.mark.parametrize("case", thinned(_cases(), 1, _name))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert interpreting()
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(float("nan"), *a))


@pytest.fixture(params=[1, 132], ids=["one part", "many parts"])
def parts(request, monkeypatch):
    """Sums in one part, written at once, and in as many as there are tiles, through a buffer."""
    monkeypatch.setattr(lowrank, "processors", lambda device: request.param)


def make(case):
    """Factors of a size that leaves y of order one."""
    (t, i, o), r, (dtype, factor), layout = case
    torch.manual_seed(0)
    x, dz = (lay(torch.randn(t, n).to(dtype), layout) for n in (i, o))
    tensors = tuple(lay((torch.randn(*s) / r**0.5).to(factor), layout) for s in ((r, i), (r, i), (o, r), (o, r)))
    return SimpleNamespace(x=x, dz=dz, tensors=tensors, r=r, dtype=dtype, factor=factor, layout=layout)


def want(m):
    """(update, dx, da1, da2, db1, db2) by autograd of the dense product in fp64."""
    x, *f = leaves = [v.double().requires_grad_() for v in (m.x, *m.tensors)]
    a1, a2, b1, b2 = f
    y = SCALE * (x @ ((b1 @ a1) * (b2 @ a2)).T)
    return y.detach(), *torch.autograd.grad(y, leaves, m.dz.double())


def plain(m):
    """The same as a product of rank r*r in PyTorch, in x's dtype; gradients of wider factors are sums in the factors' dtype."""
    a1, a2, b1, b2 = m.tensors
    A = (a1[:, None] * a2).flatten(0, 1).to(m.dtype)
    B = (b1[:, :, None] * b2[:, None]).flatten(1).to(m.dtype)
    wide = torch.promote_types(m.dtype, m.factor)
    u, du = m.x @ A.T, SCALE * (m.dz @ B)
    dA = (du.to(wide).T @ m.x.to(wide)).unflatten(0, (m.r, m.r))
    dB = (SCALE * (m.dz.to(wide).T @ u.to(wide))).unflatten(1, (m.r, m.r))
    grads = (dA * a2).sum(1), (dA * a1[:, None]).sum(0), (dB * b2[:, None]).sum(2), (dB * b1[:, :, None]).sum(1)
    return SCALE * (u @ B.T), du @ A, *(g.to(m.factor) for g in grads)


def everything_needed(m, dx=None):
    got, grads = ops.back(m.dz, m.x, m.tensors, SCALE, dx, True, (True,) * 4)
    return dict(zip(("dx", *NAMES), (got, *grads), strict=True))


def assert_gradients(got, truth, yardstick):
    for (name, g), w, p in zip(got.items(), truth[1:], yardstick[1:], strict=True):
        assert_as_good(g, w, p, name)


@cases
def test_fresh_and_add(case, parts):
    """What memory held before, here NaN, is neither read nor left anywhere."""
    m = make(case)
    y64, y = want(m)[0], plain(m)[0]
    bias = lay(torch.randn(m.dz.shape[1], 1).to(m.factor), m.layout)[:, 0]
    got = ops.fresh(m.x, m.tensors, SCALE, bias)
    assert_as_good(got, y64 + bias.double(), y + bias.to(m.dtype), "y with bias")
    assert got.is_contiguous()
    got = lay(m.dz.clone(), m.layout)
    assert ops.add(got, m.x, m.tensors, SCALE) is None
    assert_as_good(got, y64 + m.dz.double(), y + m.dz, "y added to")


@cases
def test_back(case, parts):
    m = make(case)
    truth, yardstick = want(m), plain(m)
    assert_gradients(everything_needed(m), truth, yardstick)
    given = lay(m.x.clone(), m.layout)
    assert ops.back(m.dz, None, m.tensors, SCALE, given, True, (False,) * 4) == (given, (None,) * 4)
    assert_as_good(given, m.x.double() + truth[1], m.x + yardstick[1], "dx added to")


@pytest.mark.parametrize("r", [3, 12])
def test_du_and_db_in_one_pass_and_in_two(r, monkeypatch, parts):
    """Which is chosen by traffic alone: both are right at every rank."""
    for fuses in (True, False):
        monkeypatch.setattr(hadamard.tiles, "hadamard_fuses", lambda rank, fuses=fuses: fuses)
        m = make((SHAPES[1], r, (F16, F32), "plain"))
        assert_gradients(everything_needed(m), want(m), plain(m))


def test_u_is_padded_with_zeros():
    m = make((SHAPES[0], 3, (F32, F32), "plain"))
    a1, a2 = m.tensors[:2]
    u = hadamard.down(m.x, a1, a2, F32).view(-1, 3, 4)
    assert not u[..., 3].any() and u[..., :3].all()


@pytest.mark.parametrize("need_x,given", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_only_what_is_needed(needs, need_x, given):
    m = make(((9, 10, 7), 3, (F32, F32), "plain"))
    whole = everything_needed(m)
    zeros = torch.zeros_like(m.x) if given else None
    x = m.x if any(needs) else None
    dx, grads = ops.back(m.dz, x, m.tensors, SCALE, zeros, need_x, needs)
    assert torch.equal(dx, whole["dx"]) if need_x else dx is None
    assert dx is zeros or not given
    for name, needed, got in zip(NAMES, needs, grads, strict=True):
        assert torch.equal(got, whole[name]) if needed else got is None


def test_x_of_another_dtype_is_cast_inside():
    """Under autocast x is fp32 and y and dz are fp16: as if x had been cast before the call."""
    m = make((SHAPES[0], 3, (F16, F32), "plain"))
    x, y = m.x.float() + 1e-5, m.dz.clone()
    ops.add(y, x, m.tensors, SCALE)
    m.x = x
    got = everything_needed(m)
    m.x = x.half()
    truth, yardstick = want(m), plain(m)
    assert_as_good(y, truth[0] + m.dz.double(), yardstick[0] + m.dz, "y")
    assert_gradients(got, truth, yardstick)


def test_two_runs_give_the_same_bits(monkeypatch):
    """Whatever memory held before."""
    results = []
    for value in (float("nan"), 1e4):
        monkeypatch.setattr(lowrank.memory, "empty", lambda *a, value=value: filled(value, *a))
        m = make(((150, 40, 35), 12, (F16, F32), "plain"))
        results.append(everything_needed(m) | {"y": ops.fresh(m.x, m.tensors, SCALE, None)})
    for name, first in results[0].items():
        assert torch.equal(first, results[1][name]), name


@pytest.mark.parametrize("r", [3, 5])
def test_no_tokens(r):
    m = make(((0, 40, 35), r, (F16, F32), "plain"))
    got = everything_needed(m)
    for name in NAMES:
        assert got[name].numel() and not got[name].any(), name
    assert got["dx"].shape == (0, 40) and ops.fresh(m.x, m.tensors, SCALE, None).shape == (0, 35)


def test_offsets_past_two_to_the_31():
    """Rows 2**30 + 8 apart: the third begins past 2**31. The pages between them are never touched."""
    stride, t, n = 2**30 + 8, 3, 16
    x = torch.empty(2 * stride + n, dtype=F16).as_strided((t, n), (stride, 1))
    x.copy_(torch.randn(t, n))
    near, factors = x.clone(), (*torch.randn(2, 2, n), *torch.randn(2, n, 2))
    assert torch.equal(ops.fresh(x, factors, SCALE, None), ops.fresh(near, factors, SCALE, None))
    both = [ops.back(v, v, factors, SCALE, None, True, (True,) * 4) for v in (x, near)]
    for far, close in zip((both[0][0], *both[0][1]), (both[1][0], *both[1][1]), strict=True):
        assert torch.equal(far, close)
    ops.add(x, near, factors, SCALE)
    ops.add(near, near.clone(), factors, SCALE)
    assert torch.equal(x, near)


def last_rank_tile_dropped(monkeypatch):
    real = hadamard._sizes
    monkeypatch.setattr(hadamard, "_sizes", lambda tile, P: real(tile._replace(rank=P), P))


def last_part_of_a_sum_dropped(monkeypatch):
    real = lowrank._sum
    monkeypatch.setattr(lowrank, "_sum", lambda parts, out, count: real(parts, out, max(2, count - 1) if count > 1 else 1))


def factors_swapped(monkeypatch):
    real = hadamard.down
    monkeypatch.setattr(hadamard, "down", lambda x, a1, a2, dtype: real(x, a2, a1, dtype))


@pytest.mark.parametrize("plant", [None, last_rank_tile_dropped, last_part_of_a_sum_dropped, factors_swapped])
def test_a_planted_fault_is_found(plant, monkeypatch):
    case = ((70, 70, 70), 5, (F32, F32), "plain")
    if plant is None:
        return test_back(case, None)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_back(case, None)


def test_bad_input():
    m = make((SHAPES[0], 3, (F32, F32), "plain"))
    a1, a2, b1, b2 = m.tensors
    with pytest.raises(TypeError, match=r"hadamard fresh: b1 is torch.float64.*impl='torch'"):
        ops.fresh(m.x, (a1, a2, b1.double(), b2), SCALE, None)
    with pytest.raises(ValueError, match=r"rank 33; Triton takes 1 to 32.*impl='torch'"):
        ops.fresh(m.x, (*torch.randn(2, 33, 40), *torch.randn(2, 35, 33)), SCALE, None)
    for call in (
        lambda: ops.fresh(m.x[:, :39], m.tensors, SCALE, None),
        lambda: ops.fresh(m.x, (a1, a2[:2], b1, b2), SCALE, None),
        lambda: ops.fresh(m.x, (a1, a2, b1[:, :2], b2[:, :2]), SCALE, None),
        lambda: ops.fresh(m.x, m.tensors, SCALE, torch.ones(34)),
        lambda: ops.add(m.dz[:3], m.x, m.tensors, SCALE),
        lambda: ops.back(m.dz[:, :20], m.x, m.tensors, SCALE, None, False, (True,) * 4),
        lambda: ops.back(m.dz, m.x[:3], m.tensors, SCALE, None, False, (True,) * 4),
    ):
        with pytest.raises(ValueError, match="has shape"):
            call()


def test_opcheck_of_every_operator():
    m = make(((9, 10, 7), 3, (F32, F32), "plain"))
    calls = {
        "triton_hadamard_fresh": (m.x, *m.tensors, SCALE, torch.randn(7)),
        "triton_hadamard_add": (m.dz, m.x, *m.tensors, SCALE),
        "triton_hadamard_back": (m.dz, m.x, *m.tensors, SCALE, True, True, False, True, True),
        "triton_hadamard_back_add": (m.x.clone(), m.dz, m.x, *m.tensors, SCALE, False, True, True, True),
    }
    assert set(calls) == {schema.partition("(")[0] for schema, _, _ in ops._OPERATORS}
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, arguments)
