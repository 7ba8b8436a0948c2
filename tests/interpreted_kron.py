"""The Kronecker kernels in Triton's interpreter; run by test_interpreter.py in a process of its own.

fp32 and fp16 only: the interpreter's tl.dot multiplies the bit patterns of bf16. Every buffer is filled with NaN first.
Oracle: the dense product x kron(C, D)^T in fp64, and its autograd. Yardstick: two products in PyTorch, D first.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from interpreted_lowrank import F16, F32, LAYOUTS, filled, lay
from thinned import thinned
from tolerance import assert_as_good

from fastpeft.ops import kron_triton as ops
from fastpeft.ops.launch import interpreting, kernels

kron = kernels("kron")
lowrank = kron.lowrank
SCALE = 0.37

# tokens, a, b, c, d: everything ragged; sizes of 1; several tiles of b and d; of c; of a
SHAPES = [(33, 5, 7, 8, 5), (5, 1, 35, 1, 40), (5, 35, 1, 40, 1), (3, 3, 131, 9, 67), (3, 5, 3, 67, 4), (3, 67, 4, 5, 3)]
DTYPES = [(F32, F32), (F16, F16), (F16, F32)]


def _cases():
    """(shape, (dtype of x, dtype of factors), layout): all shapes in fp32 and fp16; then all dtypes and layouts of one."""
    for n, (shape, dtypes) in enumerate(itertools.product(SHAPES, (DTYPES[0], DTYPES[2]))):
        yield shape, dtypes, LAYOUTS[n % 3]
    for dtypes, layout in itertools.product(DTYPES, LAYOUTS):
        yield (17, 3, 7, 5, 6), dtypes, layout


def _name(case):
    shape, (x, factor), layout = case
    return f"{'x'.join(map(str, shape))}-{str(x)[6:]}-{str(factor)[6:]}-{layout}"


cases = pytest.mark.parametrize("case", thinned(_cases(), 1, _name))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert interpreting()
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(float("nan"), *a))


@pytest.fixture(params=[1, 132], ids=["one part", "many parts"])
def parts(request, monkeypatch):
    """Sums over tokens in one part, written at once, and in as many as there are tiles, through a buffer."""
    monkeypatch.setattr(lowrank, "processors", lambda device: request.param)


def make(case):
    (t, a, b, c, d), (dtype, factor), layout = case
    torch.manual_seed(0)
    x, dz = (lay(torch.randn(t, n).to(dtype), layout) for n in (c * d, a * b))
    C, D = (lay(torch.randn(*s).to(factor), layout) for s in ((a, c), (b, d)))
    return SimpleNamespace(x=x, dz=dz, C=C, D=D, dtype=dtype, layout=layout)


def want(m):
    """(update, dx, dC, dD) by autograd of the dense product in fp64."""
    x, C, D = (v.double().requires_grad_() for v in (m.x, m.C, m.D))
    y = SCALE * (x @ torch.kron(C, D).T)
    return y.detach(), *torch.autograd.grad(y, (x, C, D), m.dz.double())


def product(x, C, D):
    h = x.unflatten(1, (C.shape[1], D.shape[1])) @ D.T
    return SCALE * (C @ h).flatten(1)


def plain(m):
    """The same in PyTorch: products in x's dtype; gradients of wider factors are sums in the factors' dtype."""
    x, C, D, dz = (v.to(m.dtype) for v in (m.x, m.C, m.D, m.dz))
    z, e = dz.unflatten(1, (len(C), len(D))), None
    h, e = x.unflatten(1, (C.shape[1], D.shape[1])) @ D.T, C.T @ z
    wide = torch.promote_types(m.dtype, m.C.dtype)
    dC = SCALE * torch.einsum("tik,tjk->ij", z.to(wide), h.to(wide))
    dD = SCALE * torch.einsum("tjk,tjl->kl", e.to(wide), x.unflatten(1, (C.shape[1], -1)).to(wide))
    return product(x, C, D), product(dz, C.T, D.T), dC.to(m.C.dtype), dD.to(m.D.dtype)


@cases
def test_fresh_and_add(case):
    """What memory held before, here NaN, is neither read nor left anywhere."""
    m = make(case)
    y64, y = want(m)[0], plain(m)[0]
    assert_as_good(ops.fresh(m.x, (m.C, m.D), SCALE, None), y64, y, "y")
    bias = lay(torch.randn(m.dz.shape[1], 1).to(m.C.dtype), m.layout)[:, 0]
    got = ops.fresh(m.x, (m.C, m.D), SCALE, bias)
    assert_as_good(got, y64 + bias.double(), y + bias.to(m.dtype), "y with bias")
    assert got.is_contiguous()
    got = lay(m.dz.clone(), m.layout)
    assert ops.add(got, m.x, (m.C, m.D), SCALE) is None
    assert_as_good(got, y64 + m.dz.double(), y + m.dz, "y added to")


@cases
def test_back(case, parts):
    m = make(case)
    dx, grads = ops.back(m.dz, m.x, (m.C, m.D), SCALE, None, True, (True, True))
    for name, got, w, p in zip(("dx", "dC", "dD"), (dx, *grads), want(m)[1:], plain(m)[1:], strict=True):
        assert_as_good(got, w, p, name)
    given = lay(m.x.clone(), m.layout)
    assert ops.back(m.dz, None, (m.C, m.D), SCALE, given, True, (False, False)) == (given, (None, None))
    assert_as_good(given, m.x.double() + want(m)[1], m.x + plain(m)[1], "dx added to")


@cases
def test_one_gradient_alone(case, parts):
    """Where both are wanted one kernel makes them, if they fit; alone, dC has a kernel of its own."""
    m = make(case)
    for k in (0, 1):
        dx, grads = ops.back(m.dz, m.x, (m.C, m.D), SCALE, None, False, (k == 0, k == 1))
        assert dx is None and grads[1 - k] is None
        assert_as_good(grads[k], want(m)[2 + k], plain(m)[2 + k], "dC dD".split()[k])


def test_both_gradients_by_one_kernel_and_by_two():
    """The shapes above hold both: what is tested is what is launched."""
    one = [kron.tiles.kron_both(*shape[1:], False, 2, "sm_90") is not None for shape in SHAPES]
    assert any(one) and not all(one)


def test_x_of_another_dtype_is_cast_inside():
    """Under autocast x is fp32 and y and dz are fp16: as if x had been cast before the call."""
    m = make(((17, 3, 7, 5, 6), (F16, F32), "plain"))
    x = m.x.float() + 1e-5
    y = m.dz.clone()
    ops.add(y, x, (m.C, m.D), SCALE)
    dx, grads = ops.back(m.dz, x, (m.C, m.D), SCALE, None, True, (True, True))
    m.x = x.half()
    truth, yardstick = want(m), plain(m)
    assert_as_good(y, truth[0] + m.dz.double(), yardstick[0] + m.dz, "y")
    for name, got, w, p in zip(("dx", "dC", "dD"), (dx, *grads), truth[1:], yardstick[1:], strict=True):
        assert_as_good(got, w, p, name)


def everything(t):
    m = make(((t, 3, 7, 5, 6), (F16, F32), "plain"))
    dx, (dC, dD) = ops.back(m.dz, m.x, (m.C, m.D), SCALE, None, True, (True, True))
    alone = ops.back(m.dz, m.x, (m.C, m.D), SCALE, None, False, (True, False))[1][0]
    return {"y": ops.fresh(m.x, (m.C, m.D), SCALE, None), "dx": dx, "dC": dC, "dD": dD, "dC alone": alone}


def test_two_runs_give_the_same_bits(monkeypatch):
    """Whatever memory held before."""
    monkeypatch.setattr(lowrank, "processors", lambda device: 132)
    first = everything(150)
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(1e4, *a))
    second = everything(150)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_no_tokens():
    got = everything(0)
    for name in ("dC", "dD", "dC alone"):
        assert got[name].numel() and not got[name].any(), name
    assert got["y"].shape == (0, 21) and got["dx"].shape == (0, 30)


def test_offsets_past_two_to_the_31():
    """Rows 2**30 + 8 apart: the third begins past 2**31. The pages between them are never touched."""
    stride, t, n = 2**30 + 8, 3, 15
    x = torch.empty(2 * stride + n, dtype=F16).as_strided((t, n), (stride, 1))
    x.copy_(torch.randn(t, n))
    near, factors = x.clone(), (torch.randn(3, 3), torch.randn(5, 5))
    assert torch.equal(ops.fresh(x, factors, SCALE, None), ops.fresh(near, factors, SCALE, None))
    for needs in ((True, True), (True, False)):
        both = [ops.back(v, v, factors, SCALE, None, False, needs)[1] for v in (x, near)]
        for far, close in zip(*both, strict=True):
            assert far is close is None or torch.equal(far, close)
    ops.add(x, near, factors, SCALE)
    ops.add(near, near.clone(), factors, SCALE)
    assert torch.equal(x, near)


def last_column_tile_dropped(monkeypatch):
    real = kron.tiles.kron
    monkeypatch.setattr(kron.tiles, "kron", lambda *a: real(*a)._replace(d=16))
    monkeypatch.setattr(kron.triton, "cdiv", lambda n, size: max(1, n // size))


def last_part_of_a_sum_dropped(monkeypatch):
    real = lowrank._sum
    monkeypatch.setattr(lowrank, "_sum", lambda parts, out, count: real(parts, out, max(2, count - 1) if count > 1 else 1))


def factors_swapped(monkeypatch):
    real = kron.fresh
    monkeypatch.setattr(kron, "fresh", lambda x, C, D, scale, bias: real(x, D, C, scale, bias))


@pytest.mark.parametrize("plant", [None, last_column_tile_dropped, last_part_of_a_sum_dropped, factors_swapped])
def test_a_planted_fault_is_found(plant, monkeypatch):
    monkeypatch.setattr(lowrank, "processors", lambda device: 132)
    case = ((33, 4, 6, 4, 18), (F32, F32), "plain")
    if plant is None:
        return test_back(case, None)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test_back(case, None)


def test_bad_input():
    m = make(((4, 3, 7, 5, 6), (F32, F32), "plain"))
    with pytest.raises(TypeError, match=r"kron fresh: C is torch.float64.*impl='torch'"):
        ops.fresh(m.x, (m.C.double(), m.D), SCALE, None)
    for call in (
        lambda: ops.fresh(m.x[:, :29], (m.C, m.D), SCALE, None),
        lambda: ops.fresh(m.x, (m.C, m.D), SCALE, torch.ones(20)),
        lambda: ops.add(m.dz[:3], m.x, (m.C, m.D), SCALE),
        lambda: ops.back(m.dz[:, :20], m.x, (m.C, m.D), SCALE, None, False, (True, True)),
        lambda: ops.back(m.dz, m.x[:3], (m.C, m.D), SCALE, None, False, (False, True)),
    ):
        with pytest.raises(ValueError, match="has shape"):
            call()


def test_opcheck_of_every_operator():
    m = make(((5, 3, 2, 4, 3), (F32, F32), "plain"))
    calls = {
        "triton_kron_fresh": (m.x, m.C, m.D, SCALE, torch.randn(6)),
        "triton_kron_add": (m.dz, m.x, m.C, m.D, SCALE),
        "triton_kron_grads": (m.dz, m.x, m.C, m.D, SCALE, True, False),
    }
    assert set(calls) == {schema.partition("(")[0] for schema, _, _ in ops._OPERATORS}
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, arguments)
