"""The norm kernel in Triton's interpreter; run by test_interpreter.py in a process of its own.

fp32 and fp16 only: the interpreter's tl.dot multiplies the bit patterns of bf16. Every buffer is filled with NaN first.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from interpreted_lowrank import F16, F32, LAYOUTS, filled, in_fp64_and_plain, lay
from thinned import thinned
from tolerance import assert_as_good

from fastpeft.ops.launch import interpreting, kernels
from fastpeft.ops.rownorm import row_sq_norm
from fastpeft.ops.rownorm_triton import row_sq_norm_forward

lowrank = kernels("lowrank")

# out, in; enough rows that the largest error of plain PyTorch is no accident
SHAPES = [(35, 40), (70, 300), (1000, 7)]
RANKS = [1, 3, 8, 16, 20, 130]
DTYPES = [(F32, F32), (F16, F16), (F16, F32)]


@pytest.fixture(autouse=True, params=[1, 132], ids=["one part", "many parts"])
def poisoned(request, monkeypatch):
    """NaN in every buffer; rows summed at once, and in as many parts as there are tiles."""
    assert interpreting()
    monkeypatch.setattr(lowrank, "processors", lambda device: request.param)
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(float("nan"), *a))


def norm(W, A, B):
    return (W + B @ A).square().sum(1)


@pytest.mark.parametrize("shape,r,dtypes,layout", thinned(itertools.product(SHAPES, RANKS, DTYPES, LAYOUTS)))
def test_norm(shape, r, dtypes, layout):
    o, i = shape
    dtype, factor = dtypes
    W = lay(torch.randn(o, i).to(dtype), layout)
    A, B = lay(torch.randn(r, i).to(factor), layout), torch.randn(o, r).to(factor)
    want, plain = in_fp64_and_plain(norm, F32, W=W, A=A, B=B)
    assert_as_good(row_sq_norm_forward(W, A, B), want, plain, "norm")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_without_factors(shape, dtype, layout):
    W = lay(torch.randn(*shape).to(dtype), layout)
    want, plain = in_fp64_and_plain(lambda W: W.square().sum(1), F32, W=W)
    assert_as_good(row_sq_norm_forward(W), want, plain, "norm")


def test_a_row_that_nearly_cancels():
    """W + B A = 1e-3 of W: the expansion into three sums loses all of it in fp32."""
    A, B = torch.randn(8, 300), torch.randn(70, 8)
    W = (-(B.double() @ A.double()) * (1 - 1e-3)).float()
    want, plain = in_fp64_and_plain(norm, F32, W=W, A=A, B=B)
    got = row_sq_norm_forward(W, A, B)
    assert_as_good(got, want, plain, "norm")
    expansion = W.square().sum(1) + 2 * (B * (W @ A.T)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
    assert (expansion.double() - want).abs().max() > 10 * (got.double() - want).abs().max()


def test_it_equals_the_reference_in_torch():
    W, A, B = torch.randn(35, 40), torch.randn(3, 40), torch.randn(35, 3)
    want = norm(W.double(), A.double(), B.double())
    assert_as_good(row_sq_norm_forward(W, A, B), want, row_sq_norm(W, A, B), "norm")


def test_two_runs_give_the_same_bits(monkeypatch):
    W, A, B = torch.randn(70, 300), torch.randn(20, 300), torch.randn(70, 20)
    first = row_sq_norm_forward(W, A, B)
    monkeypatch.setattr(lowrank.memory, "empty", lambda *a: filled(1e4, *a))
    assert torch.equal(first, row_sq_norm_forward(W, A, B))


def test_nothing_to_sum():
    assert row_sq_norm_forward(torch.empty(0, 8)).shape == (0,)
    assert torch.equal(row_sq_norm_forward(torch.empty(3, 0)), torch.zeros(3))


def test_offsets_past_two_to_the_31():
    """Rows 2**30 + 8 apart: the third begins past 2**31. The pages between them are never touched."""
    stride, o, i = 2**30 + 8, 3, 16
    W = torch.empty(2 * stride + i, dtype=F16).as_strided((o, i), (stride, 1))
    W.copy_(torch.randn(o, i))
    assert torch.equal(row_sq_norm_forward(W), row_sq_norm_forward(W.clone()))


def test_bad_input():
    W, A, B = torch.randn(3, 8), torch.randn(2, 8), torch.randn(3, 2)
    with pytest.raises(TypeError, match=r"W is torch.float64.*impl='torch'"):
        row_sq_norm_forward(W.double(), A, B)
    with pytest.raises(ValueError, match="A and B come together"):
        row_sq_norm_forward(W, A)


def test_opcheck():
    W, A, B = torch.randn(9, 16), torch.randn(3, 16), torch.randn(9, 3)
    for arguments in ((W, A, B), (W, None, None)):
        torch.library.opcheck(torch.ops.fastpeft.row_sq_norm_forward.default, arguments)
