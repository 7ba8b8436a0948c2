"""The sizes, dtypes and layouts that stage parts tries."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bench.gpu.common import Run
from bench.gpu.part_operators import Case

# family -> tokens and size as in Case
Sizes = dict[str, list[tuple[int, tuple[int, ...]]]]
LAYOUTS = ("plain", "transposed", "sliced")
# everything ragged, sizes of one, several tiles of each
SMALL: Sizes = {
    "kron": [(33, (5, 7, 8, 5)), (5, (1, 35, 1, 40)), (3, (3, 131, 9, 67)), (3, (67, 4, 5, 3))],
    "hadamard": [(33, (40, 35, 3)), (9, (12, 10, 12)), (70, (150, 130, 3))],
    "sparse": [(33, (40, 35, 60)), (9, (40, 35, 1400)), (70, (300, 200, 900)), (5, (40, 35, 0))],
}
RANKS = (1, 4, 5, 16, 32)
LARGE: Sizes = {
    "kron": [
        (8192, (16, 256, 16, 256)), (4099, (64, 64, 64, 64)), (2048, (16, 896, 16, 256)), (4099, (5, 819, 7, 585)),
        (512, (8, 512, 1024, 4)),
    ],
    "hadamard": [
        *((8192, (4096, 4096, r)) for r in (4, 8, 16, 32)), (4099, (4095, 4101, 8)), (2048, (4096, 14336, 8))
    ],
    "sparse": [
        *((8192, (4096, 4096, int(p * 4096 * 4096))) for p in (0.0005, 0.003, 0.02)), (4099, (4095, 4101, 160_000))
    ],
}  # fmt: skip


def pairs(run: Run) -> list[tuple[torch.dtype, torch.dtype]]:
    """Of y and of factors: factors of y's dtype, and in fp32."""
    return [(d, f) for d in run.dtypes for f in dict.fromkeys((d, torch.float32))]


def cases(run: Run) -> Iterator[Case]:
    """Small shapes with every layout in turn, one of them with every pair of dtypes; ranks; autocast; large shapes, and rows
    far apart.
    """
    low = run.dtypes[-1] if run.dry else run.dtype
    main = [(low, torch.float32), (torch.float32, torch.float32)]
    for family, shapes in SMALL.items():
        ways = [*((pair, shapes[0]) for pair in pairs(run)), *itertools.product(main, shapes[1:])]
        for n, (pair, shape) in enumerate(ways):
            yield Case(family, *shape, *pair, LAYOUTS[n % 3])
        for layout in LAYOUTS:
            yield Case(family, *shapes[0], low, torch.float32, layout, x=torch.float32)
    for rank in RANKS:
        yield Case("hadamard", 17, (40, 35, rank), low, torch.float32)
    if run.dry:
        return
    for family, shapes in LARGE.items():
        for shape in shapes:
            yield Case(family, *shape, run.dtype, torch.float32)
        for pair in pairs(run):
            if pair != main[0]:
                yield Case(family, *shapes[-2], *pair)
        yield Case(family, 3, SMALL[family][0][1], run.dtype, torch.float32, "far")
