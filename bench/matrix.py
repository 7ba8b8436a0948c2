"""docs/MATRIX.md, what works with what: python -m bench.matrix runs every probe of tests/probes.py and tests/sharding.py and writes it.

    python -m bench.matrix [--columns bias export ...]     the other columns stay as the file has them

A cell is what one run gave. An error that the library does not raise on purpose, or a wrong number, ends the run and writes nothing.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT
from fastpeft.registry import every_recipe

FILE = ROOT / "docs/MATRIX.md"
# column -> what a cell of it says
COLUMNS = {
    "bias": '`adapt(..., bias="all")`: every bias trains, and is saved with the adapter',
    "dropout": "acts in training, with a gradient at every parameter of the method, and is off in evaluation",
    "4-bit base": '`adapt(..., quantize="nf4")`: output and gradients are those over the dense weight that the codes stand for',
    "two adapters": "with `lora` (or `melora`) at the same layers: both train, and neither changes what the other computes",
    "merge": "merged weights compute the same; unmerged, `unload` gives the old weights back, bit for bit",
    "export": "stock PEFT loads the folder and computes the same: in PEFT's own layout of the method, or as a plain LoRA",
    "compile": '`torch.compile(fullgraph=True, backend="aot_eager")`: output, gradients and evaluation',
    "FSDP2": "`fully_shard` of every layer and of the model over two gloo processes: output and gradients",
    "checkpointing": "`torch.utils.checkpoint`, reentrant and not, with dropout: output and gradients, bit for bit",
}
# (works, remark or error) by column, by method
Cells = dict[str, dict[str, tuple[bool, str]]]
HEAD = """# What works with what

Written by `python -m bench.matrix`, which runs every cell on a small fp64 model on the CPU; [tests/test_matrix.py](../tests/test_matrix.py)
runs them again and fails where this page says otherwise. Every figure is held against plain PyTorch or stock PEFT, to fp64 rounding.
"No" is an error that the library raises before it computes anything wrong; the footnote is its beginning, with METHOD for the method.

{columns}

A method with a training procedure runs here as if one were attached; FSDP2 refuses the procedure itself (`attach` says so). `hydralora` merges and
exports with `heads=1`, `moa` with one expert fixed, `loda` never. No cell says anything about a GPU.
"""


def render(cells: Cells, written: str) -> str:
    """The text of docs/MATRIX.md; written: the line that says with which versions."""
    notes: dict[str, int] = {}
    rows = ["| method | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, row in cells.items():
        shown = []
        for column in COLUMNS:
            works, remark = row[column]
            if works:
                shown.append(f"yes, {remark}" if remark else "yes")
            else:
                shown.append(f"no[^{notes.setdefault(remark, len(notes) + 1)}]")
        rows.append(f"| [{name}](methods/{name}.md) | {' | '.join(shown)} |")
    columns = "\n".join(f"* **{name}**: {text}." for name, text in COLUMNS.items())
    feet = [f"[^{k}]: {text}" for text, k in notes.items()]
    return "\n".join([HEAD.format(columns=columns), written, "", *rows, "", *feet]) + "\n"


def read(text: str) -> tuple[Cells, str]:
    """(cells, the line with the versions) of such a text."""
    notes = dict(re.findall(r"^\[\^(\d+)\]: (.*)$", text, re.M))
    rows = [[c.strip() for c in s.strip("|").split("|")] for s in text.splitlines() if s.startswith("|")]
    cells: Cells = {}
    for first, *others in rows[2:]:
        name = re.fullmatch(r"\[(\w+)\]\(methods/\1\.md\)", first)
        if name is None or len(others) != len(rows[0]) - 1:
            raise ValueError(f"docs/MATRIX.md: a row begins with {first!r} and has {len(others)} cells.")
        cells[name[1]] = {column: _cell(cell, notes) for column, cell in zip(rows[0][1:], others, strict=True)}
    written = re.search(r"^Last written .*$", text, re.M)
    return cells, written[0] if written else ""


def _cell(cell: str, notes: Mapping[str, str]) -> tuple[bool, str]:
    found = re.fullmatch(r"(yes)(?:, (.+))?|no\[\^(\d+)\]", cell)
    if found is None:
        raise ValueError(f"docs/MATRIX.md: {cell!r} is no cell: yes, a yes with a remark, or a no with a footnote.")
    return (True, found[2] or "") if found[1] else (False, notes[found[3]])


def measured(columns: list[str]) -> dict[str, dict[str, Any]]:
    """column -> method -> (works, remark), from runs."""
    sys.path.insert(0, str(ROOT / "tests"))
    import probes
    import sharding

    names = [r.name for r in every_recipe()]
    found: dict[str, dict[str, Any]] = {}
    for column in columns:
        print(column, flush=True)
        if column == "FSDP2":
            with tempfile.TemporaryDirectory() as folder:
                found[column] = sharding.outcomes(names, Path(folder))
        else:
            found[column] = {n: probes.outcome(n, probes.PROBES[column]) for n in names}
    return {c: {n: (o.works, o.remark) for n, o in row.items()} for c, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    columns = parser.parse_args().columns
    torch.set_num_threads(1)
    kept = read(FILE.read_text())[0] if columns != list(COLUMNS) else {}
    found = measured(columns)
    cells = {
        r.name: {c: found[c][r.name] if c in found else kept[r.name][c] for c in COLUMNS} for r in every_recipe()
    }
    import peft

    versions = f"torch {torch.__version__}, PEFT {peft.__version__} and Python {platform.python_version()} on {platform.machine()}"
    FILE.write_text(render(cells, f"Last written with {versions}."))
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
