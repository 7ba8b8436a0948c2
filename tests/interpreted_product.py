"""The base product with the low-rank share in it, in Triton's interpreter; run by test_interpreter.py in a process of its own.

fp32 and fp16: the interpreter multiplies bit patterns of bf16. y is filled with NaN first.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import assert_as_good

from fastpeft.ops.launch import interpreting, kernels

product = kernels("product")
TILE = product.PlainTile(rows=32, cols=32, depth=16, group=2)
# tokens, in, out, rank: whole tiles; ragged in every size; one tile and less; more row tiles than a group
SHAPES = [(64, 64, 96, 16), (40, 72, 56, 8), (8, 16, 24, 24), (200, 24, 40, 64)]
DTYPES = [torch.float32, torch.float16]
FORMS = [TILE, TILE._replace(flat=True), TILE._replace(parts=2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,across,share,tile", list(itertools.product(SHAPES, [False, True], [False, True], FORMS)))
def test_product(shape, across, share, tile, dtype):
    assert interpreting()
    t, i, o, r = shape
    draw = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=draw).to(dtype)  # noqa: E731
    x, u = normal(t, i), normal(t, r)
    W, F = (normal(i, o), normal(r, o)) if across else (normal(o, i), normal(o, r))
    y = torch.full((t, o), float("nan"), dtype=dtype)
    product.product(x, W, u if share else None, F if share else None, y, across, tile, 3)

    def formula(wide):
        w, f = (W.to(wide), F.to(wide)) if across else (W.to(wide).T, F.to(wide).T)
        return x.to(wide) @ w + (u.to(wide) @ f if share else 0)

    assert_as_good(y, formula(torch.float64), formula(dtype))
