"""Random supports: which entries of a matrix a Bernoulli mask keeps, from the counter-based generator of the dropout.

Two draws per entry. The first is dropout's own, 16 bits at (column, row), with the probability k / 65536 next above the
density; the few entries that pass it draw 32 bits more, at the counter (column, row, 1, 0), for the rest. So a density down to
1e-9 is met, at dropout's speed, and every device, thread count and library version gives the same entries.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from fastpeft.ops.dropout import dropout, philox

# numbers of the matrix that are drawn at a time
CHUNK = 1 << 22


def key(seed: int, name: str) -> int:
    """The generator's 64-bit key of a layer: of the seed and the layer's name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def bernoulli(key: int, rows: int, cols: int, density: float) -> Tensor:
    """int32 [2, nnz] on the CPU, row-major: each of [rows, cols] with probability `density`, independently."""
    coarse = min(65536, math.ceil(density * 65536))
    if coarse == 0 or rows * cols == 0:
        return torch.empty(2, 0, dtype=torch.int32)
    seed = torch.tensor(key, dtype=torch.int64)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    limit = round(density * 65536 / coarse * 2**32)
    step = max(1, CHUNK // cols)
    found = []
    for row in range(0, rows, step):
        ones = torch.ones(min(step, rows - row), cols)
        r, c = torch.nonzero(dropout(ones, seed, 1 - coarse / 65536, row), as_tuple=True)
        r = r + row
        word = philox((c, r, torch.ones_like(c), torch.zeros_like(c)), (low, high))[0]
        taken = word < limit
        found.append(torch.stack([r[taken], c[taken]]).to(torch.int32))
    return torch.cat(found, 1)


def counted(key: int, rows: int, cols: int, count: int) -> Tensor:
    """int32 [2, count], row-major: `count` different entries, each set of them as likely as any other."""
    generator = torch.Generator().manual_seed(key)
    flat = torch.randperm(rows * cols, generator=generator)[:count].sort().values
    return torch.stack([flat // cols, flat % cols]).to(torch.int32)


def columns(rows: int, cols: int, density: float, *, tail: bool) -> Tensor:
    """int32 [2, nnz], row-major: the first int(rows * cols * density) entries column by column, from the left or the right.

    The last of these columns holds the remainder, in its first rows.
    """
    count = int(rows * cols * density)
    k = torch.arange(count)
    c, r = k // rows, k % rows
    flat = (r * cols + (cols - 1 - c if tail else c)).sort().values
    return torch.stack([flat // cols, flat % cols]).to(torch.int32)
