"""Stage sanitizer: bench.gpu.tiny under compute-sanitizer's memcheck and racecheck."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from bench.gpu.common import Row, Run, Task, verdict
from bench.machine import ROOT

TOOLS = ("memcheck", "racecheck")
ERROR = 9
SECONDS = 200


def tasks(run: Run) -> Iterator[Task]:
    """First without the tool, which also fills Triton's cache: compiling under it takes long."""
    yield {"tool": "none"}, lambda: tiny(run, [])
    for tool in TOOLS:
        yield {"tool": tool}, lambda tool=tool: sanitized(run, tool)


def sanitized(run: Run, tool: str) -> Row:
    binary = find()
    if not run.cuda:
        return {"skipped": "CUDA only"}
    if binary is None:
        return {"skipped": "compute-sanitizer is not installed"}
    return tiny(run, [binary, "--tool", tool, "--error-exitcode", str(ERROR), "--target-processes", "all"])


def find() -> str | None:
    places = [shutil.which("compute-sanitizer"), *sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))]
    return next((p for p in places if p), None)


def tiny(run: Run, before: list[str]) -> Row:
    """Without torch's memory pool, so that a step past a tensor leaves an allocation."""
    command = [*before, sys.executable, "-m", "bench.gpu.tiny", "--device", run.device]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    text = (done.stdout + done.stderr).strip().splitlines()
    summaries = [s.strip("= ") for s in text if "SUMMARY" in s or "ran" in s.split()]
    return {
        "right": done.returncode == 0,
        "wrong": "; ".join(text[-6:]) if done.returncode else "",
        "said": summaries,
    }


def table(found: list[Row], dry: bool) -> str:
    return "\n".join(f"{r['tool']:<10} {verdict(r)} {'; '.join(r.get('said', []))}" for r in found)
