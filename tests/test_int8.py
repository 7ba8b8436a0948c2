"""int8 weights: codes and dense weight against the formula, number by number."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops import int8

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# the fp32 number nearest to 1/127, by which bitsandbytes multiplies
INVERSE = torch.tensor(1 / 127, dtype=F32)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_codes_are_the_nearest_integers(dtype):
    W = torch.randn(9, 33, dtype=F32).to(dtype)
    for given in (W, W.T.contiguous().T):
        codes, absmax = int8.quantise(given)
        assert codes.dtype is torch.int8 and absmax.dtype is F32
        assert torch.equal(absmax, W.abs().amax(1).float())
        exact = W.double() * 127 / absmax.double()[:, None]
        assert (codes.double() - exact).abs().max() <= 0.5 + 127 * 4 * torch.finfo(F32).eps
        assert (codes.abs().amax(1) == 127).all()


def test_of_two_integers_at_equal_distance_the_even_one():
    W = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert int8.quantise(W)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("shape", [(7, 33), (1, 1), (300, 70)])
def test_the_dense_weight(shape, dtype):
    """Products of two fp32 numbers are exact in fp64: each rounding here is the only one."""
    codes, absmax = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0])
    scale = (absmax.double() * INVERSE.double()).float()
    want = (codes.double() * scale.double()[:, None]).float().to(dtype)
    assert torch.equal(int8.dequantise(codes, absmax, dtype), want)
    got = torch.full(shape, float("nan"), dtype=dtype)
    int8.fill_torch(got, codes, absmax)
    assert torch.equal(got, want)


def test_a_row_of_zeros_is_zero():
    W = torch.randn(4, 8)
    W[2] = 0.0
    codes, absmax = int8.quantise(W)
    assert absmax[2] == 0 and not codes[2].any() and not int8.dequantise(codes, absmax, F32)[2].any()


def test_quantising_what_codes_stand_for_gives_the_codes():
    W = torch.randn(32, 64)
    codes, absmax = int8.quantise(W)
    Q = int8.dequantise(codes, absmax, F32)
    assert torch.equal(int8.quantise(Q)[0], codes) and not torch.equal(Q, W)
    assert ((Q - W).abs() <= absmax[:, None] / 127 * (0.5 + 127 * 4 * torch.finfo(F32).eps)).all()


def test_bad_input():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            int8.quantise(torch.tensor([[1.0, bad]]))
    for W in (torch.zeros(2, 2, dtype=torch.int8), torch.zeros(4)):
        with pytest.raises(TypeError, match="it must be a float matrix, and not quantised already"):
            int8.quantise(W)


def test_opcheck():
    codes, absmax = torch.randint(-127, 128, (5, 9), dtype=torch.int8), torch.rand(5)
    for after in (None, torch.randn(3)):
        torch.library.opcheck(torch.ops.fastpeft.int8_dequantise.default, (codes, absmax, BF16, after))
