"""Rows of bench.lowrank as text: overheads per shape and dtype, then the quotients that claims are about."""

from __future__ import annotations

import statistics
from typing import Any

from bench.arms import AGAIN, FROZEN, peft_name

Row = dict[str, Any]
SAME, FP32 = "adapters in the layer's dtype", "fp32 adapters"


def lowrank_table(rows: list[Row]) -> str:
    runs: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        runs.setdefault((*row["shape"], row["dtype"]), {})[row["arm"]] = row
    parts = [_run(key, arms) for key, arms in runs.items()]
    return "\n\n".join([*parts, _claims(runs)])


def _run(key: tuple[Any, ...], arms: dict[str, Row]) -> str:
    t, i, o, dtype = key
    frozen, again = arms[FROZEN], arms.get(AGAIN, {})
    head = f"[{t}, {i} -> {o}] {dtype}, dropout {frozen['dropout']:g}, {frozen['rounds']} rounds: frozen {frozen['ms']:.2f} ms"
    if "ratio" in again:
        head += f"; A/A control {again['ratio']:.3f} [{again['iqr'][0]:.3f}, {again['iqr'][1]:.3f}]"
    lines = [head]
    for name, row in arms.items():
        if name not in (FROZEN, AGAIN):
            lines.append(f"  {name:<38} {_timing(row)}")
    return "\n".join(lines)


def _timing(row: Row) -> str:
    if "ms" not in row:
        return f"WRONG in {', '.join(row['wrong'])} (error {row['error']:.1e}), not timed"
    low, high = row["overhead_iqr_ms"]
    return (
        f"overhead {row['overhead_ms']:8.2f} ms [{low:.2f}, {high:.2f}]   ratio {row['ratio']:.3f} "
        f"[{row['iqr'][0]:.3f}, {row['iqr'][1]:.3f}]   error {row['error']:.1e}"
    )


def claims(runs: dict[tuple[Any, ...], dict[str, Row]]) -> dict[str, list[float | None]]:
    """Claim -> quotient of overheads per run; None where an arm is missing, wrong, or the other's overhead is
    not positive.
    """
    found: dict[str, list[float | None]] = {}
    for (*_, dtype), arms in runs.items():
        for name, row in arms.items():
            if row["library"] != "fastpeft":
                continue
            for title, rival in _rivals(row, dtype).items():
                quotient = row.get("against", {}).get(rival, {}).get("overhead")
                found.setdefault(f"{name} / {title}", []).append(quotient)
    return found


def _rivals(row: Row, dtype: str) -> dict[str, str]:
    """Title of the claim's other side -> its arm in a layer of `dtype`."""
    if row["method"] == "melora":
        return {"fastpeft lora": "fastpeft lora"}
    method = row["method"]
    return {
        f"PEFT {method}, {SAME}": peft_name(method, dtype),
        f"PEFT {method}, {FP32}": peft_name(method, "float32"),
    }


def _claims(runs: dict[tuple[Any, ...], dict[str, Row]]) -> str:
    columns = [f"{t}x{i}x{o} {dtype}" for t, i, o, dtype in runs]
    lines = ["Quotients of overheads; columns: " + ", ".join(columns) + "; then their median"]
    for title, quotients in claims(runs).items():
        known = [q for q in quotients if q is not None]
        cells = ["-" if q is None else f"{q:.2f}" for q in quotients]
        middle = f"{statistics.median(known):.2f}" if known else "-"
        lines.append(f"  {title:<62} {' '.join(f'{c:>6}' for c in cells)}   median {middle}")
    slow = slower(runs)
    lines.append("Slower than PEFT's arm: " + ("" if slow else "no fastpeft arm that was timed"))
    lines += ["  " + s for s in slow]
    return "\n".join(lines)


def slower(runs: dict[tuple[Any, ...], dict[str, Row]]) -> list[str]:
    """Every fastpeft arm whose median time is above that of PEFT's arm in the same rounds (melora: PEFT's
    lora).
    """
    return [
        f"{name}: {q['time'][1]:.2f} times {rival}, at [{t}, {i} -> {o}] {dtype}"
        for (t, i, o, dtype), arms in runs.items()
        for name, row in arms.items()
        for rival, q in row.get("against", {}).items()
        if rival.startswith("PEFT") and q["time"][1] > 1
    ]
