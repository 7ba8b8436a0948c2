"""The rows of a comparison, and report.md made of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastpeft.job.compare_store import Store
from fastpeft.job.recipes import BESIDE, Entry

if TYPE_CHECKING:
    from fastpeft.job.compare import Plan

SUCCESS, FAILED, WAITING, LEFT_OUT = "success", "failed", "not run yet", "left out"
HEADER = ["recipe", "accuracy", "seeds", "loss", "rate", "trains", "kept, KiB/token", "file, KiB", "step / frozen", "step / PEFT LoRA"]
EDGE = {"lowest": "↓", "highest": "↑"}


def gather(store: Store, plan: Plan) -> list[dict[str, Any]]:
    """A row for each recipe that the folder or the plan has, by falling accuracy; rows without one come last."""
    asked = {e.title: e for e in plan.entries}
    rows = [_row(store, asked.get(t), t, plan) for t in dict.fromkeys([*asked, *store.titles()])]
    return sorted(rows, key=lambda r: (r["accuracy"] is None, -(r["accuracy"] or 0), r["loss"] or 0))


def _row(store: Store, entry: Entry | None, title: str, plan: Plan) -> dict[str, Any]:
    from fastpeft.job.compare import chosen_rate

    held, timing = store.record(title), store.timing(title)
    entry = entry or Entry(title, held["method"], held["options"], held["arm"])
    pilots = sorted((r for r in held["runs"] if r["seed"] == plan.pilot_seed), key=lambda r: r["rate"])
    rate = chosen_rate(held, plan.pilot_seed)
    own = sorted((r for r in held["runs"] if r["seed"] != plan.pilot_seed and r["rate"] == rate), key=lambda r: r["seed"])
    done = [r for r in own if not r.get("error")]
    errors = [r for r in (*own, *(pilots if rate is None else ())) if r.get("error")]
    status = LEFT_OUT if entry.left_out else SUCCESS if done else FAILED if errors else WAITING
    accuracies, losses = [r["scores"][-1][1] for r in done], [r["scores"][-1][0] for r in done]
    rates = [r["rate"] for r in pilots]
    edge = None if rate is None or len(rates) < 2 else {min(rates): "lowest", max(rates): "highest"}.get(rate)
    why = entry.left_out or "; ".join(dict.fromkeys(f"rate {r['rate']:g}, seed {r['seed']}: {r['error']}" for r in errors)) or None
    return {
        "title": title, "method": entry.method, "options": dict(entry.options), "arm": entry.arm, "status": status, "why": why, "note": entry.note,
        "retry": any(r.get("error") and not r["final"] for r in held["runs"]), "rate": rate, "edge": edge, "pilots": pilots, "runs": done,
        "seeds": [r["seed"] for r in done], "accuracies": accuracies, "accuracy": statistics.fmean(accuracies) if done else None,
        "spread": statistics.stdev(accuracies) if len(done) > 1 else None, "loss": statistics.fmean(losses) if done else None,
        "own": held.get("own"), "trainable": held.get("trainable"), "parameters": held.get("parameters"), "system": held.get("system"),
        "saved_per_token": held["saved_bytes"] / held["tokens"] if "tokens" in held else None, "about": held.get("note"),
        "aside": done[0]["aside"] if done else {}, "file_bytes": done[0]["file_bytes"] if done else None,
        "ratio": timing.get("ratio"), "to_peft": timing.get("to_peft"), "again": timing.get("again"),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header first, then the rows that were run; an empty cell is what was not measured, or what the row does not have."""
    return [HEADER, *(_cells(r) for r in rows if r["status"] in (SUCCESS, FAILED))]


def _cells(r: dict[str, Any]) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    if r["status"] != SUCCESS:
        return [r["title"], r["status"], *[""] * (len(HEADER) - 2)]
    spread = f" ± {r['spread']:.3f}" if r["spread"] is not None else ""
    size = None if r["file_bytes"] is None else r["file_bytes"] / 1024
    return [
        r["title"], f"{r['accuracy']:.3f}{spread}", str(len(r["seeds"])), f"{r['loss']:.3f}", f"{r['rate']:g}{EDGE.get(r['edge'], '')}", f"{r['own']:,d}",
        f"{r['saved_per_token'] / 1024:.1f}", shown(size, ",.0f"), shown(r["ratio"], ".2f"), shown(r["to_peft"], ".2f"),
    ]  # fmt: skip


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table with aligned columns, for a terminal."""
    cells = table(rows)
    widths = [max(len(r[k]) for r in cells) for k in range(len(HEADER))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells)


def as_markdown(store: Store, rows: Sequence[dict[str, Any]]) -> str:
    """The whole report.md."""
    s = store.settings
    header, *body = table(rows)
    grid = "\n".join(f"| {' | '.join(r)} |" for r in [header, ["---", *["---:"] * (len(header) - 1)], *body])
    timed = [r for r in rows if r["again"] is not None]
    runs = [q for r in rows for q in (*r["runs"], *r["pilots"])]
    made = {f"{k} {v}" for q in runs for k, v in q["versions"].items()}
    threads = sorted({q["threads"] for q in runs})
    return "\n\n".join(p for p in [
        f"# {sum(r['status'] == SUCCESS and r['arm'] == 'fastpeft' for r in rows)} recipes on {s.get('model name')}",
        _settings(s, rows, threads),
        _state(rows),
        grid,
        _marks(rows),
        "![accuracy against kept memory](pareto.png)",
        "![accuracy against step time](pareto_time.png)" if any(r["status"] == SUCCESS and r["ratio"] is not None for r in rows) else "",
        "![evaluation loss of the pilot runs by learning rate](rates.png)",
        "![loss curves](curves.png)",
        _reading(s, timed),
        _notes(rows),
        "## Versions\n\n" + ", ".join(sorted(made)) + "." if made else "",
    ] if p) + "\n"  # fmt: skip


def _settings(s: dict[str, Any], rows: Sequence[dict[str, Any]], threads: list[int]) -> str:
    train, held = s.get("examples", [0, 0])
    rates = sorted({q["rate"] for r in rows for q in r["pilots"]})
    seeds = sorted({n for r in rows for n in r["seeds"]})
    return (
        f"{train} texts to learn from, {held} to be judged on: {s.get('data description')}. {s['epochs']} epoch{'s' * (s['epochs'] > 1)}, batch "
        f"{s['batch_size']}, texts cut at {s['max_length']} tokens, AdamW with linear warm-up over {s['warmup']:.0%} of the steps and linear decay, weight decay "
        f"{s['weight_decay']:g}, gradients clipped at {s['clip']:g}; {s['dtype']}, {s['device']}, {', '.join(map(str, threads))} thread(s). Adapted: "
        f"{s['target_modules'] if isinstance(s['target_modules'], str) else ', '.join(s['target_modules'])}; options are each recipe's defaults but where its "
        f"row below says otherwise. Learning rates {', '.join(f'{r:g}' for r in rates)}, chosen by evaluation loss on seed {s['pilot seed']}; reported: "
        f"seeds {', '.join(map(str, seeds)) or 'none yet'}."
    )


def _state(rows: Sequence[dict[str, Any]]) -> str:
    waiting = [r["title"] for r in rows if r["status"] == WAITING]
    most = max((len(r["seeds"]) for r in rows), default=0)
    fewer = [r["title"] for r in rows if r["status"] == SUCCESS and len(r["seeds"]) < most]
    parts = [f"Not run yet: {', '.join(waiting)}." if waiting else "", f"Fewer seeds than the others so far: {', '.join(fewer)}." if fewer else ""]
    return "**Unfinished.** " + " ".join(p for p in parts if p) if any(parts) else ""


def _marks(rows: Sequence[dict[str, Any]]) -> str:
    edges = [r["title"] for r in rows if r["edge"] and r["status"] == SUCCESS]
    mark = "↓ and ↑: the chosen rate is the grid's lowest or highest, so a better one may lie beyond it"
    return f"{mark} ({len(edges)} of {sum(r['status'] == SUCCESS for r in rows)} rows)." if edges else ""


def _reading(s: dict[str, Any], timed: Sequence[dict[str, Any]]) -> str:
    held = s.get("examples", [0, 0])[1]
    error = f" One accuracy of 0.8 on {held} texts has a standard error of {(0.16 / held) ** 0.5:.3f}." if held else ""
    times = (
        f"Times are medians of interleaved steps on the longest batch; a second frozen model beside the first took {min(r['again'] for r in timed):.2f} to "
        f"{max(r['again'] for r in timed):.2f} of its time."
        if timed
        else "Step times are not measured yet: `--timings` does it, on a machine with nothing else to do."
    )
    majority = f" The most frequent class has {s['majority']:.3f}." if s.get("majority") is not None else ""
    return (
        f"Accuracy: mean over the seeds ± standard deviation.{error}{majority} Rates are chosen on the texts that recipes are judged on, by another seed.\n\n"
        "Rate: of all that trains, the new head included; what a method multiplies it by is its own (LoRA+: 16 for B). Trains: numbers of the adapter, beside the head. Kept: "
        "bytes that autograd keeps between forward and backward of a step on the longest texts, per token of the padded batch; `frozen` needs no "
        f"backward through the encoder at all. File: the saved tensors, the head's among them. {times}\n\n"
        "`results/` holds each run in the schema of PEFT's method comparison; null is what was not measured or does not apply, times among it."
    )


def _notes(rows: Sequence[dict[str, Any]]) -> str:
    beside = {e.title for e in BESIDE}
    lines = []
    for r in sorted(rows, key=lambda r: r["title"]):
        said = [f"{k}={v}" for k, v in r["options"].items()] if r["title"] not in beside else []
        parts = [", ".join(said), r["note"] or "", ", ".join(f"{n} examples are {k}'s alone" for k, n in r["aside"].items())]
        parts.append(f"{r['status']}: {r['why']}" if r["why"] else "")
        if any(parts):
            lines.append(f"* **{r['title']}**: {'; '.join(p for p in parts if p)}.")
    return "## Rows that need a word\n\n" + "\n".join(lines) if lines else ""
