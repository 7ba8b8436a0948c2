"""Alternatives to the tiles that kron, hadamard and sparse get from triton_kernels/tiles.py, on the real operators.

One field is changed at a time; each alternative is checked against fp64 before it is timed. The table of tiles.py is changed
by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from bench.gpu import part_operators as whole
from bench.gpu import part_sparse as entries
from bench.gpu.common import SHAPES, Row, Run, ratios, shown, spoiled, summary, times
from bench.gpu.part_operators import Case
from bench.gpu.parts import CODES
from bench.gpu.structured_operators import TRITON, launches, rotated
from bench.gpu.tiles import AGAIN, DEFAULT, ROUNDS
from fastpeft.ops.launch import kernels


class Sweep(NamedTuple):
    """chooser: the function of tiles.py.   kernel: its first argument where one function chooses for several kernels.

    timed: an operator of structured_operators or a gradient of part_sparse.   checked: an operator of part_operators.
    """

    family: str
    chooser: str
    kernel: str | None
    timed: str
    checked: str = ""

    def __str__(self) -> str:
        return f"{self.family} {self.kernel or self.chooser}"


SWEEPS = (
    Sweep("kron", "kron", None, "add", "add"),
    Sweep("kron", "kron_grads", None, "grads", "back"),
    Sweep("hadamard", "hadamard", "shrink", "add", "add"),
    Sweep("hadamard", "hadamard", "expand", "add", "add"),
    Sweep("hadamard", "hadamard", "outer", "grads", "back"),
    Sweep("sparse", "sddmm", None, "grad by sddmm"),
    Sweep("sparse", "masked", None, "grad by tile"),
)
# by field, what is tried, times the default's; warps and stages are tried as they stand
SCALED = {
    "kron": ("rows", "b", "d"), "hadamard": ("rows", "cols"), "sddmm": ("rows", "cols"), "masked": ("rows", "cols", "rank"),
}  # fmt: skip
WARPS, STAGES = (2, 4, 8), (1, 2, 3, 4)


def case(run: Run, sweep: Sweep) -> Case:
    t, i, o = (33, 40, 24) if run.dry else SHAPES[0]
    if sweep.family == "kron":
        size: tuple[int, ...] = (4, o // 4, 4, i // 4) if run.dry else (16, o // 16, 16, i // 16)
    elif sweep.family == "hadamard":
        size = (i, o, 3 if run.dry else 8)
    else:
        size = (i, o, 48 if run.dry else int((0.001 if sweep.chooser == "sddmm" else 0.01) * i * o))
    return Case(sweep.family, t, size, run.dtype, entries.F32)


def swept(run: Run, sweep: Sweep) -> list[Row]:
    """A row per choice, the default and its control among them; ratios: to the default in the same round."""
    chosen_case = case(run, sweep)
    sets = rotated(run, chosen_case)
    default = default_tile(sweep, sets[0])
    choices = [None, *alternatives(sweep, default)]
    calls, rows = {}, {}
    for tile in choices[:3] if run.dry else choices:
        name = DEFAULT if tile is None else shown_tile(tile)
        rows[name] = {"choice": name, "tile": default if tile is None else tile}
        if fault := _fault(run, sweep, chosen_case, tile):
            rows[name]["fault"] = fault
        else:
            calls[name] = [lambda m=m, tile=tile: _call(sweep, tile, timed(sweep, m)) for m in sets]
    calls[AGAIN], rows[AGAIN] = calls[DEFAULT], {"choice": AGAIN, "tile": default}
    seconds = times(calls, run, rounds=3 if run.dry else ROUNDS)
    return [
        row | (summary(seconds[k]) | ratios(seconds[k], seconds[DEFAULT]) if k in seconds else {})
        for k, row in rows.items()
    ]


def timed(sweep: Sweep, m: Any) -> Callable[[], Any]:
    if sweep.family == "sparse":
        return lambda: entries.TRITON[sweep.timed](m.dz, m.x, m.index)
    return launches(m)[sweep.timed].calls[TRITON]


def alternatives(sweep: Sweep, default: Any) -> Iterator[Any]:
    """Tiles that differ from the default in one field."""
    fields = SCALED["kron" if sweep.family == "kron" else sweep.chooser]
    least = getattr(default, "group", 1)
    for field in fields:
        size = getattr(default, field)
        # a dot takes 16 at least, and sddmm has none; kron's rows are tokens, of which a group is the least
        low = least if sweep.chooser == "sddmm" or (sweep.family, field) == ("kron", "rows") else 16
        yield from (default._replace(**{field: n}) for n in (size // 2, 2 * size) if n >= low)
    yield from (default._replace(warps=n) for n in WARPS if n != default.warps)
    yield from (default._replace(stages=n) for n in STAGES if n != default.stages)


def default_tile(sweep: Sweep, m: Any) -> Any:
    """What the operator asks for by itself."""
    tiles, seen = kernels("lowrank").tiles, []
    real = getattr(tiles, sweep.chooser)

    def watched(*given: Any, **more: Any) -> Any:
        tile = real(*given, **more)
        if sweep.kernel is None or given[0] == sweep.kernel:
            seen.append(tile)
        return tile

    with mock.patch.object(tiles, sweep.chooser, watched):
        timed(sweep, m)()
    return seen[0]


def _call(sweep: Sweep, tile: Any, call: Callable[[], Any]) -> Any:
    if tile is None:
        return call()
    tiles = kernels("lowrank").tiles
    real = getattr(tiles, sweep.chooser)

    def choose(*given: Any, **more: Any) -> Any:
        return tile if sweep.kernel is None or given[0] == sweep.kernel else real(*given, **more)

    with mock.patch.object(tiles, sweep.chooser, choose):
        return call()


def _fault(run: Run, sweep: Sweep, chosen: Case, tile: Any) -> str:
    """Why the choice cannot be had: it does not compile or fit, or its result is wrong."""
    try:
        if sweep.family == "sparse":
            m: Any = entries.make(chosen, run.device)
            gradient = entries.TRITON[sweep.timed]
            wrong = entries.gradient(m, lambda *given: _call(sweep, tile, lambda: gradient(*given)))[1]
        else:
            m = whole.make(chosen, run.device)
            code = CODES[sweep.family]["triton"]
            got = _call(sweep, tile, lambda: whole.OPERATORS[sweep.checked](m, code))
            wrong = whole.wrong(sweep.checked, m, got)[1]
    except Exception as error:
        if spoiled(str(error)):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "; ".join(wrong)


def shown_tile(tile: Any) -> str:
    return " ".join(f"{name} {size}" for name, size in tile._asdict().items())


def table(found: list[Row], dry: bool) -> Iterator[str]:
    """Per kernel the default, its control and the three quickest."""
    groups: dict[str, list[Row]] = {}
    for r in found:
        groups.setdefault(r["kernel"], []).append(r)
    for kernel, rows in groups.items():
        failed = [r["failed"] for r in rows if "failed" in r]
        if failed or any("us" not in r for r in rows if r["choice"] == DEFAULT):
            yield f"tiles of {kernel}: FAILED {failed[0][:120] if failed else rows[0]['fault']}"
            continue
        base, again = (next(r for r in rows if r["choice"] == name) for name in (DEFAULT, AGAIN))
        control, faults = (
            ", ".join(shown(v, dry, ".3f") for v in again["iqr"]),
            sum("fault" in r for r in rows),
        )
        yield f"tiles of {kernel}: default {shown(base['us'], dry)} us, control [{control}], {faults} with a fault"
        known = [r for r in rows if "us" in r and r["choice"] not in (DEFAULT, AGAIN)]
        yield from (
            f"    {shown(r['ratio'], dry, '.3f')}  {r['choice']}"
            for r in sorted(known, key=lambda r: r["ratio"])[:3]
        )
