"""What a comparison leaves in its folder: settings.json, runs/ with a file per recipe, timings/ likewise.

Every file is replaced by one rename, so that a kill at any moment leaves each of them whole; at most the run that was under way is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpeft.folder import replace_file
from fastpeft.job.errors import JobError
from fastpeft.job.identity import differences

# a later call may add recipes, seeds and rates, and may be on another machine
RUNS, TIMINGS, SETTINGS = "runs", "timings", "settings.json"


class Store:
    """The folder of a comparison."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check(self, identity: Mapping[str, Any]) -> None:
        """Note what makes runs comparable, or raise JobError if the folder holds runs that are not."""
        path = self.folder / SETTINGS
        held = _read(path)
        found = differences(held, {k: v for k, v in identity.items() if k in held})
        if found:
            raise JobError(f"compare: the runs in {self.folder} are other ones: {'; '.join(found)}. Use the same settings, or another --out.")
        if held | dict(identity) != held:
            _write(path, held | dict(identity))

    @property
    def settings(self) -> dict[str, Any]:
        return _read(self.folder / SETTINGS)

    def record(self, title: str) -> dict[str, Any]:
        """The runs of a recipe and what is known of it; empty where there are none."""
        return _read(self.folder / RUNS / f"{slug(title)}.json") or {"title": title, "runs": []}

    def titles(self) -> list[str]:
        """Of every recipe that has runs."""
        return [_read(p)["title"] for p in sorted((self.folder / RUNS).glob("*.json"))]

    def add(self, title: str, facts: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Keep a run, in place of one with the same seed and rate; facts: of the recipe."""
        held = self.record(title)
        same = (run["seed"], run["rate"])
        runs = [r for r in held["runs"] if (r["seed"], r["rate"]) != same]
        _write(self.folder / RUNS / f"{slug(title)}.json", held | dict(facts) | {"runs": [*runs, dict(run)]})

    def timing(self, title: str) -> dict[str, Any]:
        """What `time` kept; empty where the recipe was not timed."""
        return _read(self.folder / TIMINGS / f"{slug(title)}.json")

    def time(self, title: str, found: Mapping[str, Any]) -> None:
        _write(self.folder / TIMINGS / f"{slug(title)}.json", {"title": title} | dict(found))


def slug(title: str) -> str:
    """The title as part of a file's name."""
    return title.replace(" ", "-")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise JobError(f"compare: {path}: cannot be read ({e}); remove it, and its runs are made again.") from None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    # one entry of the outer object a line, one run a line: readable, and small
    parts = [f"{json.dumps(k)}: {_lines(v) if k == 'runs' else json.dumps(v, allow_nan=False)}" for k, v in content.items()]
    replace_file(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def _lines(runs: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(r, allow_nan=False) for r in runs) + "\n]"
