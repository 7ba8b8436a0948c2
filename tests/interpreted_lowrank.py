"""The low-rank kernels in Triton's interpreter; run by test_interpreter.py in a process of its own.

fp32 and fp16 only: the interpreter's tl.dot multiplies the bit patterns of bf16. Every buffer that a launcher gets is
filled with NaN first. Oracles: the formula in fp64, and fp64 autograd of the whole layer.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from thinned import thinned
from tolerance import assert_as_good

import fastpeft
from fastpeft.ops import lowrank_triton as ops
from fastpeft.ops.launch import interpreting, kernels

lowrank = kernels("lowrank")
philox_keep = kernels("philox").keep

F32, F16 = torch.float32, torch.float16
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
SCALE = 0.37

# tokens, in, out, blocks: ragged; blocks narrower than a tile, at no multiple of 8, and wider than a tile
SHAPES = [(33, 40, 35, 1), (33, 40, 35, 5), (9, 39, 36, 3), (70, 300, 270, 2)]
DTYPES = [(F32, F32), (F16, F16), (F16, F32)]
LAYOUTS = ["plain", "transposed", "sliced"]


def _cases():
    """(shape, rank, (dtype of x, dtype of factors), p, layout): all shapes, dtypes and p; then ranks; then layouts."""
    for n, (shape, dtypes, p) in enumerate(itertools.product(SHAPES, DTYPES, (0.0, 0.3))):
        yield shape, 8, dtypes, p, LAYOUTS[n % 3]
    for n, (rank, dtypes) in enumerate(itertools.product((1, 3, 16, 20, 130), ((F32, F32), (F16, F32)))):
        yield SHAPES[n % 2], rank, dtypes, (0.0, 0.3)[n % 2], LAYOUTS[n % 3]
    for layout in LAYOUTS:
        yield (65, 72, 48, 2), 3, (F32, F32), 0.3, layout
    # under dropout a block that begins inside a tile needs one tile more
    for dtypes in ((F32, F32), (F16, F32)):
        yield (9, 381, 36, 3), 8, dtypes, 0.3, "plain"


def _name(case):
    (t, i, o, n), rank, (x, factor), p, layout = case
    return f"{t}x{i}x{o}-blocks{n}-r{rank}-{str(x)[6:]}-{str(factor)[6:]}-p{p}-{layout}"


cases = pytest.mark.parametrize("case", thinned(_cases(), 1, _name))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert interpreting()
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(float("nan"), *a))


@pytest.fixture(params=[1, 132], ids=["one part", "many parts"])
def parts(request, monkeypatch):
    """Sums in one part, written at once, and in as many as there are tiles, through a buffer."""
    monkeypatch.setattr(lowrank, "processors", lambda device: request.param)


def filled(value, shape, dtype, device):
    return torch.full(shape, value, dtype=dtype, device=device)


def lay(tensor, layout):
    """The same values in other strides."""
    rows, cols = tensor.shape
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "sliced":
        wide = torch.full((rows + 2, 2 * cols + 3), float("nan"), dtype=tensor.dtype)
        wide[1 : rows + 1, 2 : 2 + 2 * cols : 2] = tensor
        return wide[1 : rows + 1, 2 : 2 + 2 * cols : 2]
    return tensor


def make(case):
    """x, dz [t, i or o], u, v [t, n r], A, B and what a call needs; values of order one."""
    (t, i, o, n), r, (dtype, factor), p, layout = case
    torch.manual_seed(0)
    x, dz = (lay(torch.randn(t, c).to(dtype), layout) for c in (i, o))
    u, v = (torch.randn(t, n * r).to(dtype) for _ in range(2))
    A = torch.randn(n, r, i // n).to(factor)
    B = torch.randn(n, o // n, r).to(factor)
    if n == 1:
        A, B = A[0], B[0]
    mask = fastpeft.dropout_mask(SEED, (t, i), p)
    how = dict(seed=SEED if p else None, p=p, blocks=n)
    return SimpleNamespace(
        x=x, dz=dz, u=u, v=v, A=A, B=B, mask=mask, how=how, n=n, dtype=dtype, layout=layout
    )


def dense_a(A):
    return A if A.dim() == 2 else torch.block_diag(*A)


def dense_b(B):
    return B if B.dim() == 2 else torch.block_diag(*B)


def in_fp64_and_plain(formula, dtype, **tensors):
    """The formula in fp64 and in `dtype`."""
    return formula(**{k: v.double() for k, v in tensors.items()}), formula(
        **{k: v.to(dtype) for k, v in tensors.items()}
    )


def gradient(like, left, right):
    """left^T right in the dtype of a factor, of its shape: block k of the columns of both."""
    if like.dim() == 2:
        return left.T @ right
    n = like.shape[0]
    return torch.stack([a.T @ b for a, b in zip(left.chunk(n, 1), right.chunk(n, 1), strict=True)])


def wide(m):
    """Where factors are wider than x, the plain composition that PyTorch offers sums their gradients in the factors' dtype."""
    return torch.promote_types(m.A.dtype, m.dtype)


@cases
def test_down(case, parts):
    m = make(case)
    got = ops.down(m.x, m.A, m.dtype, **m.how)
    want, plain = in_fp64_and_plain(lambda x, k, A: (x * k) @ A.T, m.dtype, x=m.x, k=m.mask, A=dense_a(m.A))
    assert_as_good(got, want, plain, "u")


@cases
@pytest.mark.parametrize("bias", [None, F32, torch.bfloat16, F16], ids=str)
def test_up(case, bias):
    """What memory held before, here NaN, is neither read nor left anywhere."""
    m = make(case)
    b = None if bias is None else lay(torch.randn(m.dz.shape[1], 1).to(bias), m.layout)[:, 0]
    got = ops.up(lay(m.v, m.layout), m.B, SCALE, m.n, b)
    b = torch.zeros(m.dz.shape[1]) if b is None else b
    want, plain = in_fp64_and_plain(
        lambda v, B, b: SCALE * (v @ B.T) + b, m.dtype, v=m.v, B=dense_b(m.B), b=b
    )
    assert_as_good(got, want, plain, "z")
    assert got.is_contiguous()


@cases
def test_up_add(case):
    m = make(case)
    got = lay(m.dz.clone(), m.layout)
    assert ops.up_add(got, m.v, m.B, SCALE, m.n) is None
    want, plain = in_fp64_and_plain(
        lambda z, v, B: z + SCALE * (v @ B.T), m.dtype, z=m.dz, v=m.v, B=dense_b(m.B)
    )
    assert_as_good(got, want, plain, "z")


@cases
@pytest.mark.parametrize("has_bias", [True, False])
def test_up_add_gain(case, has_bias):
    m = make(case)
    gain, bias = (torch.randn(m.dz.shape[1]).to(m.B.dtype) for _ in range(2))
    z = lay(m.dz.clone(), m.layout)
    y = ops.up_add_gain(z, m.v, m.B, SCALE, m.n, gain, bias if has_bias else None)

    def formula(z, v, B, g, b):
        z = z + SCALE * (v @ B.T)
        return z, z * g + b if has_bias else z * g

    want, plain = in_fp64_and_plain(formula, m.dtype, z=m.dz, v=m.v, B=dense_b(m.B), g=gain, b=bias)
    assert_as_good(z, want[0], plain[0], "z")
    assert_as_good(y, want[1], plain[1], "y")
    assert y.is_contiguous()


@cases
def test_du_db(case, parts):
    m = make(case)
    du, dB = ops.du_db(m.dz, m.v, m.B, SCALE, m.n, need_du=True, need_db=True)
    want, plain = in_fp64_and_plain(lambda dz, B: SCALE * (dz @ B), m.dtype, dz=m.dz, B=dense_b(m.B))
    assert_as_good(du, want, plain, "du")
    want, plain = in_fp64_and_plain(lambda dz, v: SCALE * gradient(m.B, dz, v), wide(m), dz=m.dz, v=m.v)
    assert_as_good(dB, want, plain, "dB")


@cases
def test_du_db_gain(case, parts):
    m = make(case)
    gain, z = torch.randn(m.dz.shape[1]).to(m.B.dtype), lay(torch.randn(m.dz.shape).to(m.dtype), m.layout)
    dz, du, dB, dgain = ops.du_db_gain(
        m.dz, z, m.v, m.B, SCALE, m.n, gain, need_du=True, need_db=True, need_dgain=True
    )
    want, plain = in_fp64_and_plain(lambda dy, g: dy * g, m.dtype, dy=m.dz, g=gain)
    assert_as_good(dz, want, plain, "dz")
    want, plain = in_fp64_and_plain(
        lambda dy, g, B: SCALE * ((dy * g) @ B), m.dtype, dy=m.dz, g=gain, B=dense_b(m.B)
    )
    assert_as_good(du, want, plain, "du")
    # dz is rounded to its dtype before it meets v, in the plain composition as in the kernel
    rounded = (m.dz * gain.to(m.dtype)).to(m.dtype)
    want = SCALE * gradient(m.B, m.dz.double() * gain.double(), m.v.double())
    assert_as_good(dB, want, SCALE * gradient(m.B, rounded.to(wide(m)), m.v.to(wide(m))), "dB")
    # a dot product per column: like BLAS the interpreter adds a tile's rows one after another, where .sum(0) adds in a tree
    want, plain = in_fp64_and_plain(lambda dy, z: torch.einsum("to,to->o", dy, z), gain.dtype, dy=m.dz, z=z)
    assert_as_good(dgain, want, plain, "dgain")


@cases
def test_dx(case):
    m = make(case)
    got = ops.dx(lay(m.u, m.layout), m.A, **m.how)
    want, plain = in_fp64_and_plain(lambda u, k, A: k * (u @ A), m.dtype, u=m.u, k=m.mask, A=dense_a(m.A))
    assert_as_good(got, want, plain, "dx")
    assert got.is_contiguous()


@cases
def test_dx_add(case):
    m = make(case)
    got = lay(m.x.clone(), m.layout)
    assert ops.dx_add(got, m.u, m.A, **m.how) is None
    want, plain = in_fp64_and_plain(
        lambda x, u, k, A: x + k * (u @ A), m.dtype, x=m.x, u=m.u, k=m.mask, A=dense_a(m.A)
    )
    assert_as_good(got, want, plain, "dx")


@cases
def test_da(case, parts):
    m = make(case)
    got = ops.da(m.x, m.u, m.A, **m.how)
    want, plain = in_fp64_and_plain(lambda x, k, u: gradient(m.A, u, x * k), wide(m), x=m.x, k=m.mask, u=m.u)
    assert_as_good(got, want, plain, "dA")


@pytest.mark.parametrize("dtype", [F32, F16])
def test_a_layer_equals_fp64_autograd(dtype):
    """Every kernel in the order of the seam, against autograd of y = gain (z0 + s drop(x) A^T B^T) + bias."""
    torch.manual_seed(0)
    t, i, o, r, p = 33, 40, 35, 5, 0.3
    mask, upstream = fastpeft.dropout_mask(SEED, (t, i), p), torch.randn(t, o).to(dtype)
    leaves = [
        torch.randn(*shape).to(d)
        for shape, d in [
            ((t, i), dtype),
            ((t, o), dtype),
            ((r, i), F32),
            ((o, r), F32),
            ((o,), F32),
            ((o,), F32),
        ]
    ]

    def autograd(d):
        x, z0, A, B, g, b = (leaf.detach().to(d).requires_grad_() for leaf in leaves)
        y = g * (z0 + SCALE * ((x * mask.to(d)) @ A.T @ B.T)) + b
        return y, torch.autograd.grad(y, (x, z0, A, B, g), upstream.to(d))

    x, z, A, B, g, b = (leaf.clone() for leaf in leaves)
    u = ops.down(x, A, dtype, seed=SEED, p=p, blocks=1)
    y = ops.up_add_gain(z, u, B, SCALE, 1, g, b)
    dz, du, dB, dg = ops.du_db_gain(
        upstream, z, u, B, SCALE, 1, g, need_du=True, need_db=True, need_dgain=True
    )
    dx = torch.zeros_like(x)
    ops.dx_add(dx, du, A, seed=SEED, p=p, blocks=1)
    dA = ops.da(x, du, A, seed=SEED, p=p, blocks=1)

    (want, wants), (plain, plains) = autograd(torch.float64), autograd(dtype)
    assert_as_good(y, want, plain, "y")
    for name, got, w, q, leaf in zip(
        "x z A B g".split(), (dx, dz, dA, dB, dg), wants, plains, leaves, strict=False
    ):
        assert_as_good(got, w, q.to(leaf.dtype), name)


@pytest.mark.parametrize("need", list(itertools.product([True, False], repeat=3)))
def test_only_what_is_needed(need):
    m = make(((33, 40, 35, 5), 3, (F32, F32), 0.0, "plain"))
    need_du, need_db, need_dgain = need
    gain = torch.randn(35)
    whole = ops.du_db_gain(m.dz, m.dz, m.v, m.B, SCALE, 5, gain, need_du=True, need_db=True, need_dgain=True)
    z, v = m.dz if need_dgain else None, m.v if need_db else None
    got = ops.du_db_gain(
        m.dz, z, v, m.B, SCALE, 5, gain, need_du=need_du, need_db=need_db, need_dgain=need_dgain
    )
    for wanted, a, b in zip((True, *need), got, whole, strict=True):
        assert torch.equal(a, b) if wanted else a is None
    du, dB = ops.du_db(m.dz, v, m.B, SCALE, 5, need_du=need_du, need_db=need_db)
    assert (du is not None, dB is not None) == (need_du, need_db)


def test_x_of_another_dtype_is_cast_inside():
    """Under autocast x is fp32 and u fp16: as if x had been cast before the call."""
    x, A, du = torch.randn(33, 40), torch.randn(3, 40), torch.randn(33, 3).half()
    for p in (0.0, 0.3):
        how, mask = dict(seed=SEED, p=p, blocks=1), fastpeft.dropout_mask(SEED, x.shape, p)
        want, plain = in_fp64_and_plain(lambda x, k, A: (x * k) @ A.T, F16, x=x.half(), k=mask, A=A)
        assert_as_good(ops.down(x, A, F16, **how), want, plain, "u")
        want, plain = in_fp64_and_plain(lambda x, k, du: du.T @ (x * k), F32, x=x.half(), k=mask, du=du)
        assert_as_good(ops.da(x, du, A, **how), want, plain, "dA")


def everything(t, n):
    """The results of every operation on t tokens."""
    m = make(((t, 40, 35, n), 3, (F16, F32), 0.3, "plain"))
    gain, dx, z, z2 = torch.randn(35), m.x.clone(), m.dz.clone(), m.dz.clone()
    ops.dx_add(dx, m.u, m.A, **m.how)
    ops.up_add(z2, m.v, m.B, SCALE, n)
    return {
        "u": ops.down(m.x, m.A, F16, **m.how),
        "y": ops.up_add_gain(z, m.v, m.B, SCALE, n, gain, gain),
        "z": z,
        "z2": z2,
        "z fresh": ops.up(m.v, m.B, SCALE, n, gain),
        "dx": dx,
        "dx fresh": ops.dx(m.u, m.A, **m.how),
        "dA": ops.da(m.x, m.u, m.A, **m.how),
        **dict(zip(("du", "dB"), ops.du_db(m.dz, m.v, m.B, SCALE, n, need_du=True, need_db=True), strict=True)),
        **dict(
            zip(
                ("dz g", "du g", "dB g", "dgain"),
                ops.du_db_gain(m.dz, z, m.v, m.B, SCALE, n, gain, need_du=True, need_db=True, need_dgain=True),
                strict=True,
            )
        ),
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 5])
def test_two_runs_give_the_same_bits(n, monkeypatch):
    """Whatever memory held before."""
    first = everything(150, n)
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(1e4, *a))
    second = everything(150, n)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("n", [1, 5])
def test_no_tokens(n):
    got = everything(0, n)
    for name in ("dA", "dB", "dB g", "dgain"):
        assert got[name].numel() and not got[name].any(), name
    for name in ("u", "y", "z", "dx", "du", "dz g", "du g"):
        assert got[name].shape[0] == 0 and got[name].dim() == 2, name
    assert got["z fresh"].shape == (0, 35) and got["dx fresh"].shape == (0, 40)


def test_nan_and_inf_pass_through_dropout():
    x = torch.full((4, 16), float("inf"))
    u = ops.down(x, torch.ones(1, 16), F32, seed=SEED, p=0.5, blocks=1)
    assert u.isnan().all()


def test_offsets_past_two_to_the_31():
    """Rows 2**30 + 8 apart: the third begins past 2**31. The pages between them are never touched."""
    stride, t, i = 2**30 + 8, 3, 16
    memory = torch.empty(2 * stride + i, dtype=F16)
    x = memory.as_strided((t, i), (stride, 1))
    x.copy_(torch.randn(t, i))
    A = torch.randn(2, i)
    assert torch.equal(
        ops.down(x, A, F16, seed=None, p=0.0, blocks=1),
        ops.down(x.clone(), A, F16, seed=None, p=0.0, blocks=1),
    )
    v, B, z = torch.randn(t, 2).half(), torch.randn(i, 2), x.clone()
    both = [ops.du_db(d, v, B, 1.0, 1, need_du=True, need_db=True) for d in (x, z)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    how = dict(seed=None, p=0.0, blocks=1)
    square = torch.randn(i, i)
    assert torch.equal(ops.up(x, square, 1.0, 1, None), ops.up(z, square, 1.0, 1, None))
    assert torch.equal(ops.dx(x, square, **how), ops.dx(z, square, **how))
    ops.up_add(x, v, B, 1.0, 1)
    ops.up_add(z, v, B, 1.0, 1)
    assert torch.equal(x, z)


@triton.jit
def mask_kernel(out, seed, row0, first, threshold, BT: tl.constexpr, BC: tl.constexpr):
    rows, cols = tl.arange(0, BT), tl.arange(0, BC)
    mask = philox_keep(tl.load(seed), rows.to(tl.int64) + row0, first, threshold, BT, BC, tl.float32)
    tl.store(out + rows[:, None] * BC + cols[None, :], mask)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("row0,first", [(0, 0), (7, 1024), (2**31 + 5, 8), (2**32 - 3, 0)])
@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, -1])
def test_the_mask_has_the_bits_of_dropout_py(p, row0, first, seed):
    from fastpeft.ops.dropout import _keep, _threshold

    key, out = torch.tensor(seed), torch.full((16, 64), float("nan"))
    mask_kernel[(1,)](out, key, row0, first, _threshold(p), BT=16, BC=64)
    assert torch.equal(out.bool(), _keep(key, 16, first + 64, p, row0)[:, first:])
    assert _threshold(p) == lowrank._threshold(p)


@pytest.mark.parametrize("name", ["x", "A"])
def test_fp64_is_refused_by_name(name):
    tensors = {"x": torch.randn(3, 8), "A": torch.randn(2, 8)}
    tensors[name] = tensors[name].double()
    with pytest.raises(TypeError, match=f"{name} is torch.float64.*impl='torch'"):
        ops.down(tensors["x"], tensors["A"], F32, seed=None, p=0.0, blocks=1)
    with pytest.raises(TypeError, match=r"dtype is torch.float64.*impl='torch'"):
        ops.down(torch.randn(3, 8), torch.randn(2, 8), torch.float64, seed=None, p=0.0, blocks=1)


def test_wrong_sizes_and_seeds_are_refused():
    x, A, v, B = torch.randn(3, 8), torch.randn(2, 8), torch.randn(3, 2), torch.randn(6, 2)
    how = dict(seed=None, p=0.0, blocks=1)
    for call in (
        lambda: ops.down(x, A[:, :7], F32, **how),
        lambda: ops.up_add(x, v, B, SCALE, 1),
        lambda: ops.up(v[:, :1], B, SCALE, 1, None),
        lambda: ops.up(v, B, SCALE, 1, torch.ones(7)),
        lambda: ops.dx_add(x, v[:, :1], A, **how),
        lambda: ops.dx(v[:, :1], A, **how),
        lambda: ops.da(x[:2], v, A, **how),
        lambda: ops.du_db(x, v, B, SCALE, 1, need_du=True, need_db=True),
        lambda: ops.up_add_gain(x, v, A.T, SCALE, 1, torch.ones(7), None),
    ):
        with pytest.raises(ValueError, match="has shape"):
            call()
    with pytest.raises(ValueError, match=r"p=0.5 needs a seed"):
        ops.down(x, A, F32, seed=None, p=0.5, blocks=1)
    with pytest.raises(ValueError, match="less than 1"):
        ops.down(x, A, F32, seed=SEED, p=1.0, blocks=1)


def test_opcheck_of_every_operator():
    m = make(((9, 16, 12, 2), 3, (F32, F32), 0.3, "plain"))
    gain, p = torch.randn(12), 0.3
    calls = {
        "lowrank_down": (m.x, m.A, F32, SEED, p, 2),
        "lowrank_up": (m.v, m.B, SCALE, 2, gain),
        "lowrank_up_add": (m.dz, m.v, m.B, SCALE, 2),
        "lowrank_up_add_gain": (m.dz, m.v, m.B, SCALE, 2, gain, None),
        "lowrank_du_db": (m.dz, m.v, m.B, SCALE, 2, True, True),
        "lowrank_du_db_gain": (m.dz, m.dz.clone(), m.v, m.B, SCALE, 2, gain, True, False, True),
        "lowrank_dx": (m.u, m.A, SEED, p, 2),
        "lowrank_dx_add": (m.x, m.u, m.A, SEED, p, 2),
        "lowrank_da": (m.x, m.u, m.A, SEED, p, 2),
    }
    assert set(calls) == {schema.partition("(")[0] for schema, _, _ in ops._OPERATORS}
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastpeft, name).default, arguments)
