"""The report of a comparison: report.md, its pictures and results/ in PEFT's schema, each file whole or absent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpeft.folder import replace_file
from fastpeft.job.compare_page import SUCCESS, as_markdown
from fastpeft.job.compare_plots import draw_curves, draw_pareto, draw_pareto_time, draw_rates
from fastpeft.job.compare_store import Store, slug
from fastpeft.job.peft_results import result
from fastpeft.job.report import _atomic

RESULTS = "results"


def write_report(store: Store, rows: Sequence[dict[str, Any]]) -> None:
    """Write all files into the store's folder. rows: of compare_page.gather."""
    folder, done = store.folder, [r for r in rows if r["status"] == SUCCESS]
    for row in done:
        for run in row["runs"]:
            body = json.dumps(result(row, run, store.settings), indent=2, allow_nan=False) + "\n"
            replace_file(folder / RESULTS / result_name(row, run), body.encode())
    if done:
        _atomic(folder / "pareto.png", lambda path: draw_pareto(done, path))
        if timed := [r for r in done if r["ratio"] is not None]:
            _atomic(folder / "pareto_time.png", lambda path: draw_pareto_time(timed, path))
        _atomic(folder / "curves.png", lambda path: draw_curves(done, path))
    piloted = [r for r in rows if r["pilots"]]
    if piloted:
        _atomic(folder / "rates.png", lambda path: draw_rates(piloted, path))
    text = as_markdown(store, rows)
    _atomic(folder / "report.md", lambda path: Path(path).write_text(text, encoding="utf-8"))


def result_name(row: dict[str, Any], run: dict[str, Any]) -> str:
    return f"{slug(row['title'])}--seed-{run['seed']}.json"
