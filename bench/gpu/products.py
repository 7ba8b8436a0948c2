"""Stage products: the base product with the low-rank share inside it, as ratios to cuBLAS's product alone, T0.

Both directions, y = x W^T + u B^T and dx = dz W + du A. Arms: T0 twice, cuBLAS accumulating onto a given result (beta=1), the
share first and cuBLAS onto it, and fused kernels in plain Triton and in Gluon, with and without the share. A kernel that is
wrong is not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.gpu.ceilings import normal
from bench.gpu.common import Row, Run, Task, copies, ratios, shown, spoiled, summary, times
from fastpeft.ops.launch import kernels

RANK = {2048: 64}
Call = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, bool], None]


def candidates(run: Run) -> dict[str, Call]:
    small = {"rows": 32, "cols": 32, "depth": 16} if run.dry else {}
    many = processors(run)
    found: dict[str, Call] = {}
    for title, stem in (("plain", "product"), ("gluon", "product_hopper")):
        if run.dry and title == "gluon":
            continue  # it has no interpreter
        module = kernels(stem)
        first = module.TILES[0]
        for tile in (*module.TILES, first._replace(group=4), first._replace(group=16)):
            found[f"{title} {named(tile)}"] = functools.partial(_call, module.product, tile._replace(**small), many)
        if title == "gluon":
            found[f"gluon {named(first)}, 128 programs"] = functools.partial(_call, module.product, first, 128)
    return found


def named(tile: Any) -> str:
    """A tile's sizes and every field that is not its default."""
    usual = type(tile)()._asdict()
    more = ", ".join(f"{k} {v}" for k, v in tile._asdict().items() if k not in ("rows", "cols") and v != usual[k])
    return f"{tile.rows}x{tile.cols}{', ' + more if more else ''}"


def _call(product: Any, tile: Any, many: int, x, W, u, F, y, across) -> None:
    product(x, W, u, F, y, across, tile, many)


def processors(run: Run) -> int:
    return torch.cuda.get_device_properties(run.device).multi_processor_count if run.cuda else 4


def tasks(run: Run) -> Iterator[Task]:
    shapes = [(64, 96, 64)] if run.dry else run.shapes
    for name, call in candidates(run).items():
        row = {"check": "product", "what": name, "case": "ragged and whole, both directions"}
        yield row, lambda call=call: checked(run, call)
    for t, i, o in shapes:
        for across in (False, True):
            head = {"shape": [t, i, o], "direction": "dx" if across else "y"}
            yield head, lambda t=t, i=i, o=o, across=across: timed(run, t, i, o, across)


def checked(run: Run, call: Call) -> Row:
    """No further from fp64 than twice what cuBLAS's product and a second one onto it are."""
    worst, found = 0.0, []
    shapes = [(64, 96, 64, 16)] if run.dry else [(2048, 4096, 4096, 64), (1000, 1096, 2008, 16), (8192, 4096, 4096, 16)]
    for t, i, o, r in shapes:
        for across in (False, True):
            for share in (True, False):
                error, allowed = errors(run, call, t, i, o, r, across, share)
                worst = max(worst, error)
                if not error <= allowed:
                    found.append(f"{[t, i, o]} {'dx' if across else 'y'}{', share' if share else ''}: {error:.2e}")
    return {"error": worst, "right": not found, "wrong": "; ".join(found)}


def _made(run: Run, t: int, i: int, o: int, r: int, across: bool) -> tuple[Tensor, ...]:
    """x [t, i], W [o, i] or [i, o], u [t, r], F [o, r] or [r, o]: a share about as large as the product."""
    x, u = normal(run, t, i), normal(run, t, r)
    W, F = (normal(run, i, o), normal(run, r, o)) if across else (normal(run, o, i), normal(run, o, r))
    return x, W, u, F


def errors(run: Run, call: Call, t: int, i: int, o: int, r: int, across: bool, share: bool) -> tuple[float, float]:
    """How far the kernel is from fp64, in Frobenius norms, and how far it may be. y is full of NaN before."""
    x, W, u, F = _made(run, t, i, o, r, across)
    y = torch.full((t, o), float("nan"), dtype=run.dtype, device=run.device)
    call(x, W, u if share else None, F if share else None, y, across)

    def formula(dtype: torch.dtype) -> Tensor:
        w, f = (m.to(dtype) if across else m.to(dtype).T for m in (W, F))
        return torch.addmm(x.to(dtype) @ w, u.to(dtype), f) if share else x.to(dtype) @ w

    want = formula(torch.float64)
    far = lambda got: float((got.double() - want).norm() / want.norm())  # noqa: E731
    return far(y), 2 * far(formula(run.dtype))


def timed(run: Run, t: int, i: int, o: int, across: bool) -> list[Row]:
    """x [t, i] as y's direction has it; dx's reads dz [t, o] and W [o, i]."""
    if across:
        i, o = o, i
    r = RANK.get(t, 16)
    sets = copies(lambda: (normal(run, t, i), normal(run, t, o), normal(run, t, r)), 2 * t * (i + o), run)
    _, W, _, F = _made(run, 1, i, o, r, across)
    w, f = (W, F) if across else (W.T, F.T)
    calls: dict[str, list[Callable[[], Any]]] = {
        "T0": [lambda x=x, y=y: torch.mm(x, w, out=y) for x, y, _ in sets],
        "T0 again": [lambda x=x, y=y: torch.mm(x, w, out=y) for x, y, _ in sets],
        "beta=1": [lambda x=x, y=y: y.addmm_(x, w, beta=1e-3, alpha=1e-3) for x, y, _ in sets],
        "share first, beta=1": [lambda x=x, y=y, u=u: torch.mm(u, f, out=y).addmm_(x, w) for x, y, u in sets],
        "share after": [lambda x=x, y=y, u=u: torch.mm(x, w, out=y).addmm_(u, f) for x, y, u in sets],
    }
    failed = []
    for name, call in candidates(run).items():
        for share in (True, False):
            title = f"{name}{', share' if share else ''}"
            try:
                error, allowed = errors(run, call, *((64, 96, 64) if run.dry else (2048, 4096, 4096)), r, across, share)
            except Exception as fault:
                if spoiled(str(fault)):
                    raise
                failed.append({"variant": title, "failed": f"{type(fault).__name__}: {str(fault)[:200]}"})
                continue
            if not error <= allowed:
                failed.append({"variant": title, "failed": f"error {error:.2e}"})
                continue
            calls[title] = [
                lambda call=call, share=share, x=x, y=y, u=u: call(x, W, u if share else None, F if share else None, y, across)
                for x, y, u in sets
            ]
    seconds = times(calls, run, rounds=3 if run.dry else 20)
    rows: list[Row] = [{"variant": name, **summary(s), **ratios(s, seconds["T0"])} for name, s in seconds.items()]
    return rows + failed


def table(found: list[Row], dry: bool) -> str:
    lines = []
    for r in found:
        if "check" in r:
            if not r.get("right"):
                lines.append(f"{r['what']}: {r.get('failed', r.get('wrong', ''))[:160]}")
            continue
        if "variant" not in r or "failed" in r:
            lines.append(f"{r['shape']} {r['direction']} {r.get('variant', '')}: FAILED {r['failed'][:120]}")
            continue
        low, high = r["iqr"]
        lines.append(
            f"{r['shape']!s:<20} {r['direction']:<3} {r['variant']:<48} {shown(r['us'], dry):>8} us "
            f"{shown(r['ratio'], dry, '.3f')} [{shown(low, dry, '.3f')}, {shown(high, dry, '.3f')}]"
        )
    return "\n".join(lines)
