"""Stage structured: the families kron, hadamard and sparse by operator, by route, by tile and in whole layers.

Operators: Triton, torch and CUDA C++ beside the limits that stage ceilings measured. Routes: what density and what rank
each is best at. Tiles: alternatives to the defaults. Layers: ratios to the frozen layer, with PEFT's LoHa, LoKr and SHiRA.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu import layers, structured_layers, structured_operators, structured_routes, structured_tiles
from bench.gpu.common import Row, Run, Task


def tasks(run: Run) -> Iterator[Task]:
    for title, shape in structured_layers.settings(run):
        head = {"what": "layer", "setting": title, "shape": list(shape), "p": 0.0}
        yield head, lambda title=title, shape=shape: structured_layers.compare(run, title, shape)
    for density in structured_routes.DENSITIES:
        head = {"what": "sparse routes", "density": density}
        yield head, lambda density=density: structured_routes.sparse_routes(run, density)
    for dtype in structured_routes.dtypes(run):
        for rank in structured_routes.RANKS:
            head = structured_routes.head(dtype, rank)
            yield head, lambda dtype=dtype, rank=rank: structured_routes.loha_routes(run, rank, dtype)
    known: dict[str, tuple[float, float]] = {}
    for case in structured_operators.cases(run):
        for name in structured_operators.OPERATORS[case.family]:
            head = {"what": "operator", "family": case.family, "operator": name, "case": str(case)}
            yield head, lambda case=case, name=name: structured_operators.timed(run, case, name, known)
    for sweep in structured_tiles.SWEEPS:
        yield {"what": "tiles", "kernel": str(sweep)}, lambda sweep=sweep: structured_tiles.swept(run, sweep)


def table(found: list[Row], dry: bool) -> str:
    lines = [layers.table([r for r in found if r["what"] == "layer"], dry)]
    lines += [structured_routes.line(r, dry) for r in found if r["what"].endswith("routes")]
    lines += [structured_operators.line(r, dry) for r in found if r["what"] == "operator"]
    return "\n".join([*lines, *structured_tiles.table([r for r in found if r["what"] == "tiles"], dry)])
