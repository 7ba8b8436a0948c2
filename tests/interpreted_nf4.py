"""The kernels that make stored weights dense, in Triton's interpreter; run by test_interpreter.py in a process of its own.

fp32 and fp16 only: the interpreter cuts fp32 to bf16 where a GPU rounds. Everything has one right answer: the bits of the
reference in torch. Every output is filled with NaN first.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fastpeft.ops import int8, nf4, nf4_triton
from fastpeft.ops.launch import interpreting

DTYPES = [torch.float32, torch.float16]
# out, in: ragged; less than a program; a last block that is shorter; several programs
SHAPES = [(37, 97), (3, 10), (33, 65), (64, 256)]


def stored(bits, block, shape, nested, seed=0):
    """Random codes and scales, of no weight in particular; a negative and a zero scale among them."""
    generator = torch.Generator().manual_seed(seed)
    n = shape[0] * shape[1]
    blocks = -(-n // block)
    top = 256 if nf4.per_byte(bits) > 1 else 2**bits
    codes = torch.randint(top, (-(-n // nf4.per_byte(bits)),), generator=generator, dtype=torch.uint8)
    if not nested:
        absmax = torch.randn(blocks, generator=generator)
        absmax[0] = 0.0
        return nf4.Packed(codes, absmax, bits, block)
    groups = -(-blocks // 4)
    inner = nf4.Nested(torch.randn(256, generator=generator), torch.rand(groups, generator=generator), torch.tensor(0.37), 4)
    return nf4.Packed(codes, torch.randint(256, (blocks,), generator=generator, dtype=torch.uint8), bits, block, None, inner)


def nan(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits,block,shape,nested", list(itertools.product([2, 3, 4, 8], [32, 64, 96], SHAPES, [False, True])))
def test_codes(bits, block, shape, nested, dtype):
    assert interpreting()
    packed = stored(bits, block, shape, nested)
    got, want = nan(shape, dtype), nan(shape, dtype)
    nf4_triton.fill(got, packed)
    nf4.fill_torch(want, packed)
    assert torch.equal(got, want)


def test_a_nested_scale_is_rounded_twice():
    """The values on which one rounding of table * absmax + offset would differ."""
    packed = stored(4, 32, (64, 256), True)
    table, absmax, offset, group = packed.nested
    exact = table[packed.absmax.int()].double() * absmax.repeat_interleave(group).double() + offset.double()
    assert not torch.equal(exact.float(), nf4.scales(packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_table(dtype):
    """bitsandbytes' FP4 is not ascending and has two zeros."""
    packed = stored(4, 64, (37, 97), False)._replace(levels=torch.randn(16))
    got, want = nan((37, 97), dtype), nan((37, 97), dtype)
    nf4_triton.fill(got, packed)
    nf4.fill_torch(want, packed)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (5, 1030)])
def test_rows(shape, dtype):
    codes, absmax = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0])
    got, want = nan(shape, dtype), nan(shape, dtype)
    nf4_triton.fill_rows(got, codes, absmax)
    int8.fill_torch(want, codes, absmax)
    assert torch.equal(got, want)


def test_nothing():
    nf4_triton.fill(torch.empty(0, 8), nf4.Packed(torch.empty(0, dtype=torch.uint8), torch.empty(0)))
    nf4_triton.fill_rows(torch.empty(0, 8), torch.empty(0, 8, dtype=torch.int8), torch.empty(0))


def test_bad_input():
    packed = stored(4, 64, (8, 64), False)
    with pytest.raises(TypeError, match=r"out is torch.float64.*impl='torch'"):
        nf4_triton.fill(torch.empty(8, 64, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match="codes has shape"):
        nf4_triton.fill(torch.empty(8, 65), packed)
    with pytest.raises(ValueError, match="absmax has shape"):
        nf4_triton.fill(torch.empty(8, 64), packed._replace(absmax=torch.ones(7)))
    with pytest.raises(ValueError, match=r"needed is torch\.float32"):
        nf4_triton.fill(torch.empty(8, 64), packed._replace(absmax=torch.ones(8, dtype=torch.bfloat16)))
    with pytest.raises(ValueError, match="levels has shape"):
        nf4_triton.fill(torch.empty(8, 64), packed._replace(levels=torch.ones(15)))
    with pytest.raises(ValueError, match=r"needed is torch\.int8"):
        nf4_triton.fill_rows(torch.empty(8, 64), packed.codes, torch.ones(8))


def test_the_operators_run_them_where_asked(monkeypatch):
    """FASTPEFT_IMPL=triton reaches the kernels from the base, and what they give is the reference's."""
    monkeypatch.setenv("FASTPEFT_IMPL", "triton")
    packed = stored(4, 64, (8, 64), True)
    called = []
    real = nf4_triton.fill
    monkeypatch.setattr(nf4_triton, "fill", lambda *a: (called.append(1), real(*a)))
    want = torch.empty(8, 64)
    nf4.fill_torch(want, packed)
    assert torch.equal(nf4.dequantise(packed, 8, 64, torch.float32), want) and called
