"""The report folder: report.json, report.md and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from fastpeft.job.outcome import Outcome, as_json
from fastpeft.job.page import as_markdown
from fastpeft.job.plots import draw_loss, draw_memory, draw_progress


def write_report(outcome: Outcome, folder: Path) -> None:
    """Write report.json, report.md, loss.png, memory.png, and ranks.png or freezing.png where a procedure counts them, into the
    folder; each file is complete or absent."""
    body = json.dumps(as_json(outcome), indent=2, allow_nan=False) + "\n"
    _atomic(folder / "report.json", lambda path: path.write_text(body, encoding="utf-8"))
    _atomic(folder / "loss.png", lambda path: draw_loss(outcome, path))
    _atomic(folder / "memory.png", lambda path: draw_memory(outcome, path))
    for kind in outcome.progress_kinds:
        _atomic(folder / f"{kind}.png", lambda path, kind=kind: draw_progress(outcome, kind, path))  # type: ignore[misc]
    _atomic(folder / "report.md", lambda path: path.write_text(as_markdown(outcome), encoding="utf-8"))


def _atomic(path: Path, write: Callable[[Path], object]) -> None:
    # the suffix stays, matplotlib reads the format from it
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(part)
        with open(part, "rb") as file:
            # the state that could make the report again is removed after it
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
