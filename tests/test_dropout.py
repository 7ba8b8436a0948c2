"""The dropout generator: published values, statistics, and equal bits from torch and C++."""

from __future__ import annotations

import math

import pytest
import torch

import fastpeft
from fastpeft.ops import dropout as d

SEED = 0x1234_5678_9ABC_DEF0


def words(counter, key, rounds):
    as_tensor = lambda vs: [torch.tensor(v, dtype=torch.int64) for v in vs]  # noqa: E731
    return [int(w) for w in d.philox(as_tensor(counter), as_tensor(key), rounds)]


def test_philox_equals_published_vectors():
    """Random123's known answers for philox4x32-10."""
    assert words([0] * 4, [0] * 2, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def scalar_keep(seed: int, row: int, col: int, p: float) -> bool:
    """The definition once more, in Python integers."""
    c, k = [col // 8, row, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    i = col % 8
    return (c[i // 2] >> (16 * (i % 2))) & 0xFFFF >= round(p * 65536)


def test_mask_equals_its_definition():
    mask = fastpeft.dropout_mask(SEED, (3, 4, 19), 0.37).view(12, 19)
    for row in range(12):
        for col in range(19):
            assert float(mask[row, col]) == (1 / (1 - 0.37) if scalar_keep(SEED, row, col, 0.37) else 0.0)


needs_extension = pytest.mark.skipif(d._EXTENSION is None, reason="built without a C++ compiler")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows,cols,row0", [(0, 5, 0), (7, 1, 0), (33, 40, 5), (129, 515, 2**31 + 7), (64, 1024, 0)])
def test_cpp_and_torch_give_the_same_bits(dtype, rows, cols, row0):
    seed = torch.tensor(SEED)
    torch.manual_seed(0)
    wide = torch.randn(cols, rows + 2).to(dtype)
    for x in (wide.T[:rows], wide.T[:rows].contiguous()):
        assert torch.equal(d._dropout_cpu(x, seed, 0.3, row0), d._dropout_torch(x, seed, 0.3, row0))
        y = torch.randn(rows, cols).to(dtype)
        other = y.clone()
        d._dropout_add_cpu(y, x, seed, 0.3, row0)
        d._dropout_add_torch(other, x, seed, 0.3, row0)
        assert torch.equal(y, other)


def test_rows_count_from_row0():
    x, seed = torch.ones(20, 17), torch.tensor(SEED)
    whole = d.dropout(x, seed, 0.5)
    assert torch.equal(d.dropout(x[6:], seed, 0.5, 6), whole[6:])
    assert torch.equal(whole.double(), fastpeft.dropout_mask(seed, (20, 17), 0.5))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate_is_binomial(p):
    n = 400 * 1000
    dropped = int((fastpeft.dropout_mask(7, (400, 1000), p) == 0).sum())
    # five standard deviations of the binomial, plus the quantisation of p to 1/65536
    assert abs(dropped - n * p) < 5 * math.sqrt(n * p * (1 - p)) + n / 65536


def test_rows_columns_and_seeds_are_independent():
    a = (fastpeft.dropout_mask(1, (512, 512), 0.5) > 0).double() - 0.5
    b = (fastpeft.dropout_mask(2, (512, 512), 0.5) > 0).double() - 0.5
    n = a.numel()
    for other in (b, a.roll(1, 0), a.roll(1, 1), a.roll(8, 1), a.T):
        # 4 * sum is a sum of n signs (a.T counts pairs twice, hence the factor of two in variance)
        assert abs(float((a * other).sum() * 4)) < 5 * math.sqrt(2 * n) + (512 if other.shape == a.T.shape else 0)


def test_larger_p_drops_a_superset():
    small, large = (fastpeft.dropout_mask(3, (64, 64), p) > 0 for p in (0.2, 0.6))
    assert bool((large <= small).all()) and int(large.sum()) < int(small.sum())


def test_nan_and_inf_propagate():
    x = torch.full((4, 16), float("nan"))
    assert bool(d.dropout(x, torch.tensor(1), 0.5).isnan().all())


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_probability(p):
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        fastpeft.dropout_mask(0, (2, 2), p)


def test_opcheck():
    x, y, seed = torch.randn(9, 11), torch.randn(9, 11), torch.tensor(5)
    torch.library.opcheck(torch.ops.fastpeft.dropout.default, (x, seed, 0.25, 3))
    torch.library.opcheck(torch.ops.fastpeft.dropout_add_.default, (y, x, seed, 0.25, 3))


def test_compiles_into_one_graph():
    seed = torch.tensor(5)
    compiled = torch.compile(lambda x: d.dropout(x, seed, 0.25) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8, 13):
        x = torch.randn(rows, 12)
        assert torch.equal(compiled(x), d.dropout(x, seed, 0.25) * 2)
