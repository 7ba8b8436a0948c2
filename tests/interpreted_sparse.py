"""The sparse kernels in Triton's interpreter; run by test_interpreter.py in a process of its own.

Gradients in fp32 and fp16 only: the interpreter's tl.dot multiplies the bit patterns of bf16. Every buffer is filled with
NaN first. Small integers, whose products and sums fp32 holds, must come out exactly: no entry can hide in a tolerance.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
from interpreted_lowrank import F16, F32, LAYOUTS, filled, in_fp64_and_plain, lay
from thinned import thinned
from tolerance import assert_as_good

from fastpeft.linear import adapted_linear
from fastpeft.ops import sparse_triton as ops
from fastpeft.ops.launch import interpreting, kernels
from fastpeft.terms import LowRank, Sparse

lowrank, sparse = kernels("lowrank"), kernels("sparse")
tiles = sparse.tiles

BF16 = torch.bfloat16
# tokens, in, out: less than a tile, and several tiles with ragged ends
SMALL, LARGE = (33, 40, 35), (70, 150, 140)
MASKS = ["none", "one", "rows", "column", "scattered", "full"]
BITS = {F32: torch.int32, F16: torch.int16, BF16: torch.int16}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    assert interpreting()
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(float("nan"), *a))


@pytest.fixture(params=[1, 10_000], ids=["one part", "many parts"])
def parts(request, monkeypatch):
    """Tokens summed at once, and in as many parts as there are tiles of them."""
    monkeypatch.setattr(lowrank, "processors", lambda device: request.param)


def entries(mask, o, i):
    """int32 [2, nnz], in row-major order."""
    chosen = torch.zeros(o, i, dtype=torch.bool)
    if mask == "one":
        chosen[-1, -1] = True
    elif mask == "rows":
        chosen[[0, o // 2, o - 1]] = True
    elif mask == "column":
        chosen[:, i // 2] = True
    elif mask == "scattered":
        chosen = torch.rand(o, i) < 0.03
    elif mask == "full":
        chosen[:] = True
    return chosen.nonzero().T.to(torch.int32).contiguous()


def at(matrix, index):
    return matrix[index[0].long(), index[1].long()]


def gradient(index):
    return lambda dz, x: at(dz.T @ x, index)


@pytest.mark.parametrize(
    "dtypes,route,case",
    thinned(
        itertools.product(
            [(F32, F32), (F16, F16), (F32, F16)], ops.ROUTES, [*((SMALL, m) for m in MASKS), (LARGE, "rows"), (LARGE, "scattered")]
        ),
        1,
    ),
)
def test_gradient_of_integers_is_exact(dtypes, route, case, parts):
    (t, i, o), mask = case
    dz, x = (torch.randint(-8, 9, (t, n)).to(d) for n, d in zip((o, i), dtypes, strict=True))
    index = entries(mask, o, i)
    got = ops.grad(dz, x, index, route=route)
    assert got.dtype == F32
    assert torch.equal(got.double(), gradient(index)(dz.double(), x.double()))


@pytest.mark.parametrize("shape,dtype,route,layout", thinned(itertools.product([SMALL, LARGE], [F32, F16], ops.ROUTES, LAYOUTS)))
def test_gradient(shape, dtype, route, layout, parts):
    t, i, o = shape
    dz, x = (lay(torch.randn(t, n).to(dtype), layout) for n in (o, i))
    index = entries("scattered", o, i)
    want, plain = in_fp64_and_plain(gradient(index), F32, dz=dz, x=x)
    assert_as_good(ops.grad(dz, x, index, route=route), want, plain, "gradient")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "hip"])
@pytest.mark.parametrize("mask", ["scattered", "full"])
def test_the_tiles_of_every_device(arch, mask, monkeypatch):
    monkeypatch.setattr(lowrank, "architecture", lambda device: arch)
    t, i, o = LARGE
    dz, x = (torch.randint(-8, 9, (t, n)).to(F16) for n in (o, i))
    index = entries(mask, o, i)
    assert torch.equal(ops.grad(dz, x, index, route="tile").double(), gradient(index)(dz.double(), x.double()))


def test_more_row_tiles_than_a_band():
    """Tiles are visited in bands of rows; the last band is not full."""
    o = (sparse.BAND + 3) * tiles.masked(4, "sm_90").cols - 1
    dz, x = torch.randint(-8, 9, (5, o)).float(), torch.randint(-8, 9, (5, 70)).float()
    index = entries("full", o, 70)
    assert torch.equal(ops.grad(dz, x, index, route="tile"), gradient(index)(dz, x))


def test_a_tile_without_entries_multiplies_nothing(monkeypatch):
    products = []
    builder = triton.runtime.interpreter.InterpreterBuilder
    real = builder.create_dot
    monkeypatch.setattr(builder, "create_dot", lambda *a: products.append(1) or real(*a))
    monkeypatch.setattr(lowrank, "processors", lambda device: 1)
    index = torch.tensor([[0, 1, 200], [0, 3, 299]], dtype=torch.int32)
    dz, x = torch.ones(33, 300), torch.ones(33, 300)
    assert torch.equal(ops.grad(dz, x, index, route="tile"), torch.full((3,), 33.0))
    # two of the tiles have entries
    assert len(products) == 2 * triton.cdiv(33, tiles.masked(4, "sm_90").rows)


@pytest.mark.parametrize("width", [1, 7, 16, 64])
@pytest.mark.parametrize("mask", MASKS)
def test_begins(mask, width):
    o, i = 35, 40
    index = entries(mask, o, i)
    begin = sparse.begins(index, o, i, width)
    assert begin.dtype == torch.int32
    listed = torch.zeros(o, triton.cdiv(i, width) * width, dtype=torch.int64)
    listed[index[0].long(), index[1].long()] = 1
    counts = listed.view(o, -1, width).sum(2).flatten()
    assert torch.equal(begin.diff().long(), counts) and begin[0] == 0 and begin[-1] == index.shape[1]


@pytest.mark.parametrize("route", ops.ROUTES)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_two_runs_give_the_same_bits(dtype, route, parts, monkeypatch):
    t, i, o = LARGE
    dz, x, index = torch.randn(t, o).to(dtype), torch.randn(t, i).to(dtype), entries("scattered", o, i)
    first = ops.grad(dz, x, index, route=route)
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(1e4, *a))
    assert torch.equal(first, ops.grad(dz, x, index, route=route))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_gradient_in_the_dtype_of_the_values(dtype):
    dz, x, index = torch.randn(33, 35), torch.randn(33, 40), entries("scattered", 35, 40)
    assert torch.equal(ops.grad(dz, x, index, dtype), ops.grad(dz, x, index).to(dtype))
    with pytest.raises(TypeError, match=r"dtype is torch.float64"):
        ops.grad(dz, x, index, torch.float64)


@pytest.mark.parametrize("route", ops.ROUTES)
def test_no_tokens(route):
    index = entries("rows", 35, 40)
    got = ops.grad(torch.empty(0, 35), torch.empty(0, 40), index, route=route)
    assert torch.equal(got, torch.zeros(index.shape[1]))


def test_the_share_of_entries_picks_the_route(monkeypatch):
    ran = []
    for name in ("sddmm", "masked"):
        fake = lambda dz, x, index, name=name: ran.append(name) or x.new_empty(index.shape[1])  # noqa: E731
        monkeypatch.setattr(sparse, name, fake)
    dz, x = torch.randn(4, 100), torch.randn(4, 100)
    edge = int(ops.TILE_FROM * 100 * 100)
    every = entries("full", 100, 100)
    for nnz, route in ((edge - 1, None), (edge, None), (edge - 1, "tile"), (edge, "sddmm")):
        ops.grad(dz, x, every[:, :nnz].contiguous(), route=route)
    assert ran == ["sddmm", "masked", "masked", "sddmm"]


def changed(W, values, index):
    """W with its entries rounded once from fp32, by indexing."""
    out = W.clone()
    out[index[0].long(), index[1].long()] = (at(W, index).float() + values.float()).to(W.dtype)
    return out


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype,of_values", [(F32, F32), (F16, F32), (BF16, F32), (F16, F16), (BF16, BF16)])
def test_copy_put_and_restore(dtype, of_values, layout, mask):
    """Values near half a unit in the last place, so that rounding matters; a second put starts from what the first left.

    The interpreter does not round to bf16 as devices do (test_compile_gate_sparse.py): there, integers that need no rounding.
    """
    W = torch.randn(35, 40).to(dtype)
    index = entries(mask, *W.shape)
    values = (torch.randn(index.shape[1]) * torch.finfo(dtype).eps / 2).to(of_values)
    if dtype == BF16:
        W = torch.randint(-8, 9, W.shape).to(dtype)
        values = torch.randint(1, 9, values.shape).to(of_values)
    want, held = changed(W, values, index), at(W, index)
    laid = lay(W, layout)
    out = lay(torch.full_like(W, float("nan")), layout)
    ops.copy(laid, values, index, out)
    assert torch.equal(bits(out), bits(want)) and torch.equal(bits(laid), bits(W))
    assert mask in ("none", "one") or not torch.equal(want, W)

    saved = ops.put(laid, values, index)
    assert torch.equal(bits(laid), bits(want)) and torch.equal(bits(saved), bits(held))
    again = ops.put(laid, values, index)
    assert torch.equal(bits(laid), bits(changed(want, values, index)))
    ops.restore(laid, index, again)
    assert torch.equal(bits(laid), bits(want))
    ops.restore(laid, index, saved)
    assert torch.equal(bits(laid), bits(W))


@pytest.mark.parametrize("dtype", BITS)
def test_restore_moves_bits(dtype):
    """Every kind of pattern: NaN with any payload, both zeros, subnormals, infinities."""
    info = torch.iinfo(BITS[dtype])
    original = torch.randint(info.min, info.max, (70, 80), dtype=BITS[dtype])
    original[0, :2] = torch.tensor([info.min, 0])
    W = original.view(dtype).clone()
    index = entries("full", 70, 80)
    saved = ops.put(W, torch.ones(index.shape[1]), index)
    assert not torch.equal(bits(W), original)
    ops.restore(W, index, saved)
    assert torch.equal(bits(W), original)


def test_what_is_not_listed_is_not_written():
    """A slice of a wider matrix: what lies around and between its entries keeps its bits."""
    whole = torch.randn(40, 50)
    before = whole.clone()
    W, index = whole[3:38, 5:45], entries("scattered", 35, 40)
    ops.put(W, torch.ones(index.shape[1]), index)
    differs = (whole != before).nonzero().T - torch.tensor([[3], [5]])
    assert torch.equal(differs.to(torch.int32), index)


def test_offsets_past_two_to_the_31():
    """Rows 2**30 + 8 apart: the third begins past 2**31. The pages between them are never touched."""
    stride, o, i = 2**30 + 8, 3, 16
    W = torch.empty(2 * stride + i, dtype=F16).as_strided((o, i), (stride, 1))
    W.copy_(torch.randint(-8, 9, (o, i)))
    index, before = entries("full", o, i), W.clone()
    for route in ops.ROUTES:
        got = ops.grad(W, torch.ones(o, 5, dtype=F16), entries("full", i, 5), route=route)
        assert torch.equal(got.view(i, 5)[:, 0], before.float().sum(0))
    saved = ops.put(W, torch.ones(o * i), index)
    assert torch.equal(W, before + 1)
    ops.restore(W, index, saved)
    assert torch.equal(W, before)


@pytest.mark.parametrize("mask", ["one", "scattered", "full"])
@pytest.mark.parametrize("how,ran", [("copy", "copy"), ("window", "put"), ("exact", "grad")])
def test_a_layer(how, ran, mask, monkeypatch):
    """Sparse beside a LoRA through the whole layer; a fallback to PyTorch would show in what ran."""
    t, i, o = SMALL
    names = []
    for name in ("grad", "copy", "put", "restore"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, real=real, name=name: (names.append(name), real(*a))[1])
    index = entries(mask, o, i)
    start = [torch.randn(shape) for shape in ((t, i), (o, i), (3, i), (o, 3), index.shape[1:])]
    d = torch.randn(t, o)

    def ours(x, W, A, B, v):
        return adapted_linear(x, W, None, [Sparse(v, index, how), LowRank(A, B, 0.5)], impl="triton")

    def composed(x, W, A, B, v):
        return x @ (W.index_put(tuple(index.long()), v, accumulate=True) + 0.5 * (B @ A)).T

    results = []
    for formula, dtype in ((ours, F32), (composed, torch.float64), (composed, F32)):
        leaves = [leaf.to(dtype, copy=True).requires_grad_(n != 1) for n, leaf in enumerate(start)]
        y = formula(*leaves)
        trained = [leaves[0], *leaves[2:]]
        results.append([y.detach(), *torch.autograd.grad(y, trained, d.to(dtype))])
        assert torch.equal(leaves[1].to(F32), start[1])
    for name, *values in zip(("y", "dx", "dA", "dB", "dvalues"), *results, strict=True):
        assert_as_good(*values, name)
    assert names.count("grad") == 1 and ran in names
    assert names.count("put") == names.count("restore") == (2 if how == "window" else 0)


def test_bad_input():
    dz, x, W = torch.randn(4, 3), torch.randn(4, 8), torch.randn(3, 8)
    index = torch.tensor([[0, 2], [1, 7]], dtype=torch.int32)
    v = torch.randn(2)
    with pytest.raises(TypeError, match=r"x is torch.float64.*impl='torch'"):
        ops.grad(dz, x.double(), index)
    with pytest.raises(ValueError, match=r"route='dense' does not exist; choose one of sddmm, tile"):
        ops.grad(dz, x, index, route="dense")
    for wrong in (index.long(), index[0], index.T.contiguous().T, torch.zeros(3, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"index is .*must be contiguous int32 \[2, nnz\]"):
            ops.put(W, v, wrong)
    with pytest.raises(ValueError, match=r"dz has shape \(5, 3\)"):
        ops.grad(torch.randn(5, 3), x, index, route="tile")
    with pytest.raises(ValueError, match=r"dz has shape \(5, 3\)"):
        ops.grad(torch.randn(5, 3), x, index, route="sddmm")
    with pytest.raises(ValueError, match=r"values has shape \(3,\)"):
        ops.put(W, torch.randn(3), index)
    with pytest.raises(ValueError, match=r"out has shape \(8, 3\)"):
        ops.copy(W, v, index, torch.empty(8, 3))
    with pytest.raises(TypeError, match=r"out is torch.float16 and W is torch.float32"):
        ops.copy(W, v, index, torch.empty(3, 8, dtype=F16))
    with pytest.raises(TypeError, match=r"saved is torch.float16 and W is torch.float32"):
        ops.restore(W, index, v.half())
    with pytest.raises(ValueError, match=r"saved has shape \(1,\)"):
        ops.restore(W, index, v[:1])


def test_opcheck():
    dz, x, W = torch.randn(4, 9), torch.randn(4, 16), torch.randn(9, 16)
    index = entries("rows", 9, 16)
    v = torch.randn(index.shape[1])
    for name, arguments in (
        ("grad", (dz, x, index, "sddmm")),
        ("grad", (dz, x, index, "tile")),
        ("copy", (W, v, index, torch.empty(9, 16))),
        ("put", (W, v, index)),
        ("restore", (W, index, v)),
    ):
        torch.library.opcheck(getattr(torch.ops.fastpeft, f"triton_sparse_{name}").default, arguments)
