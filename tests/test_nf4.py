"""NormalFloat: tables and codes against the paper's rule written slowly, the dense weight against its formula, bit for bit."""

from __future__ import annotations

import statistics

import papers
import pytest
import torch

from fastpeft.ops import nf4
from fastpeft.ops.nf4 import Nested, Packed

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# of the specification, to the digits it gives
TABLE = [
    -1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1,
]  # fmt: skip
widths = pytest.mark.parametrize("bits", nf4.BITS)


def stored(bits=4, block=64, shape=(12, 20), nested=False, seed=0):
    """Random codes and scales, of no weight in particular; the last block may be shorter."""
    generator = torch.Generator().manual_seed(seed)
    n, per = shape[0] * shape[1], nf4.per_byte(bits)
    blocks = -(-n // block)
    codes = torch.randint(256 if per > 1 else 2**bits, (-(-n // per),), generator=generator, dtype=torch.uint8)
    if not nested:
        return Packed(codes, torch.rand(blocks, generator=generator) + 0.1, bits, block)
    inner = Nested(torch.randn(256, generator=generator), torch.rand(-(-blocks // 2), generator=generator), torch.tensor(0.37), 2)
    return Packed(codes, torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8), bits, block, None, inner)


def formula(packed, shape, dtype):
    """The weight number by number: a product of two fp32 numbers is exact in fp64, so each rounding here is the only one."""
    scale = packed.absmax
    if packed.nested is not None:
        table, absmax, offset, group = packed.nested
        coarse = (table[scale.long()].double() * absmax.repeat_interleave(group)[: len(scale)].double()).float()
        scale = (coarse.double() + offset.double()).float()
    table = nf4.levels(packed.bits) if packed.levels is None else packed.levels
    codes, n, per = [], shape[0] * shape[1], nf4.per_byte(packed.bits)
    for k in range(n):
        byte = int(packed.codes[k // per])
        codes.append(byte >> packed.bits * (per - 1 - k % per) & (2**packed.bits - 1))
    product = table[codes].double() * scale.repeat_interleave(packed.block)[:n].double()
    return product.float().to(dtype).reshape(shape)


@widths
def test_levels(bits):
    table = nf4.levels(bits)
    assert table.shape == (2**bits,) and table.dtype is F32
    assert bool((table[1:] > table[:-1]).all()) and table[0] == -1 and table[-1] == 1 and (table == 0).sum() == 1
    assert (table > 0).sum() == 2 ** (bits - 1)
    # the quantiles' places are rounded to fp32, which the distribution magnifies by 1 / its density, the outermost one most
    normal = statistics.NormalDist()
    outermost = normal.inv_cdf(nf4.OFFSET)
    error = (table.double() - papers.normal_float(bits)).abs().max()
    assert error <= 2 * torch.finfo(F32).eps / normal.pdf(outermost) / outermost


def test_levels_of_the_specification():
    assert torch.allclose(nf4.levels(4), torch.tensor(TABLE), rtol=0, atol=6e-8)
    assert torch.allclose(nf4.levels(2), torch.tensor([-1, 0, 0.3379152, 1]), rtol=0, atol=6e-8)
    with pytest.raises(ValueError, match=r"bits=1; a table exists for 2 to 8"):
        nf4.levels(1)


@widths
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_codes_are_the_nearest_levels(bits, dtype):
    W = torch.randn(8, 24, dtype=F32).to(dtype)
    for given in (W, W.T.contiguous().T):
        codes, absmax = nf4.quantise(given, bits, 32)
        want, scales = papers.normal_float_codes(W.float(), bits, 32)
        assert codes.dtype is torch.uint8 and codes.numel() == 8 * 24 // nf4.per_byte(bits)
        assert torch.equal(nf4.unpack(codes, bits).long(), want)
        assert absmax.dtype is F32 and torch.equal(absmax, scales.float())


@widths
def test_of_two_levels_at_equal_distance_the_lower(bits):
    table = nf4.levels(bits)
    middle = (table[1:] + table[:-1]) / 2
    W = torch.zeros(4, 128)
    W.view(-1)[: len(middle)] = middle
    W.view(-1)[len(middle) : 2 * len(middle)] = torch.nextafter(middle, torch.ones(()))
    W[-1, -1] = 1.0
    codes = nf4.unpack(nf4.quantise(W, bits, 512)[0], bits)
    assert codes[: len(middle)].tolist() == list(range(len(middle)))
    assert codes[len(middle) : 2 * len(middle)].tolist() == list(range(1, len(middle) + 1))


@widths
def test_quantising_what_codes_stand_for_gives_the_codes(bits):
    W = torch.randn(32, 64)
    codes, absmax = nf4.quantise(W, bits)
    Q = nf4.dequantise(Packed(codes, absmax, bits), 32, 64, F32)
    again = nf4.quantise(Q, bits)
    assert torch.equal(again[0], codes) and torch.equal(again[1], absmax)
    # half the widest gap of the table is the largest error
    gap = nf4.levels(bits).diff().max()
    assert ((Q - W).abs().view(-1, 64) <= absmax[:, None] * (gap / 2 + 4 * torch.finfo(F32).eps)).all() and not torch.equal(Q, W)


def test_many_pieces_give_what_one_gives(monkeypatch):
    W, packed = torch.randn(64, 96), stored(4, 64, (37, 97), nested=True)
    whole, dense = nf4.quantise(W), torch.empty(37, 97)
    nf4.fill_torch(dense, packed)
    monkeypatch.setattr(nf4, "PIECE", 100)
    assert all(torch.equal(a, b) for a, b in zip(nf4.quantise(W), whole, strict=True))
    again = torch.empty(37, 97)
    nf4.fill_torch(again, packed)
    assert torch.equal(again, dense)


def test_a_block_of_zeros_is_zero():
    W = torch.randn(4, 64)
    W[2] = 0.0
    codes, absmax = nf4.quantise(W)
    assert absmax[2] == 0 and not nf4.dequantise(Packed(codes, absmax), 4, 64, F32)[2].any()


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("nested", [False, True])
@widths
def test_the_dense_weight(bits, nested, dtype):
    """A last block that is shorter, a byte that is not full, rows that begin inside a block; whatever was chosen to run."""
    for shape, block in (((12, 20), 32), ((7, 9), 64), ((6, 64), 64)):
        packed = stored(bits, block, shape, nested)
        want = formula(packed, shape, dtype)
        got = torch.full(shape, float("nan"), dtype=dtype)
        nf4.fill_torch(got, packed)
        assert torch.equal(got, want)
        assert torch.equal(nf4.dequantise(packed, *shape, dtype), want)


def test_another_table():
    packed = stored()._replace(levels=torch.randn(16))
    assert torch.equal(nf4.dequantise(packed, 12, 20, F32), formula(packed, (12, 20), F32))


def test_bad_input():
    W = torch.randn(4, 24)
    faults = {
        "multiple of 32 that divides": lambda: nf4.quantise(W, 4, 64),
        "blocks of 48": lambda: nf4.quantise(W, 4, 48),
        "bits=9; a table": lambda: nf4.quantise(W, 9, 32),
        "NaN or infinite": lambda: nf4.quantise(torch.full((4, 24), float("inf")), 4, 32),
        "has NaN": lambda: nf4.quantise(torch.where(torch.arange(24) == 3, float("nan"), W), 4, 32),
    }
    for match, call in faults.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match=r"torch.uint8.*not quantised already"):
        nf4.quantise(nf4.quantise(W, 4, 32)[0])


def test_opcheck():
    for packed in (stored(), stored(2), stored(nested=True), stored()._replace(levels=torch.randn(16))):
        codes, absmax, bits, block, levels, nested = packed
        for after in (None, torch.randn(3)):
            arguments = (codes, absmax, levels, *(nested or (None, None, None, 1)), bits, block, 12, 20, BF16, after)
            torch.library.opcheck(torch.ops.fastpeft.nf4_dequantise.default, arguments)
