"""Where a number was measured, and how rows are printed and kept."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastpeft.ops import dropout

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
PACKAGES = ("torch", "peft", "fastpeft", "triton")


def machine() -> dict[str, Any]:
    """CPU and its vector flags, threads, versions, commit, and what runs on the CPU: "c++" or "torch"."""
    return _fixed() | {"threads": torch.get_num_threads(), "fastpeft_impl": os.environ.get("FASTPEFT_IMPL")}


@functools.cache
def _fixed() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {k.strip(): v.strip() for k, _, v in (s.partition(":") for s in lines)}
    flags = fields.get("flags", "").split()
    has = {f: f in flags for f in ("avx512_bf16", "avx512f", "avx2")}
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_flags": {"amx": any(f.startswith("amx") for f in flags)} | has,
        "cpu_ops": dropout.backend(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    } | commit()


def version(name: str) -> str:
    """Of an installed package, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> dict[str, Any]:
    """The commit, and whether what is measured differs from it; "unknown" outside a git checkout."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "fastpeft", "triton_kernels", "csrc", "bench/*.py")
    return {"commit": head or "unknown", "changed": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def emit(row: dict[str, Any], save: Path | None = None) -> None:
    """Print one row with machine() as a JSON line; append it to `save` too."""
    line = json.dumps(row | machine())
    print(line, flush=True)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        with save.open("a") as file:
            file.write(line + "\n")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that a file of `emit` holds; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
