"""Stage build: versions, what was compiled, the card and its clocks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import torch

from bench.gpu.common import Row, Run, Task
from bench.machine import version
from fastpeft.env import environment
from fastpeft.ops.launch import interpreting

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy", "ninja", "pybind11", "pip")
QUERY = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem",
    "clocks_throttle_reasons.active", "power.draw", "power.limit", "temperature.gpu", "memory.total", "mig.mode.current",
)  # fmt: skip


def tasks(run: Run) -> Iterator[Task]:
    for what, value in (
        ("packages", lambda: {package: version(package) for package in PACKAGES}),
        ("environment", lambda: {k: str(v) for k, v in environment().items()}),
        ("interpreter", interpreting),
        ("tools", lambda: {tool: shutil.which(tool) for tool in ("nvcc", "ninja", "compute-sanitizer")}),
        ("matmul", matmul),
        ("card", lambda: card(run)),
        ("nvidia-smi", clocks),
    ):
        yield {"what": what}, lambda value=value: {"value": value()}


def matmul() -> Row:
    flags = torch.backends.cuda.matmul
    reduced = flags.allow_bf16_reduced_precision_reduction
    return {
        "tf32": flags.allow_tf32,
        "bf16 reduced-precision reduction": reduced,
        "cuda of torch": torch.version.cuda,
    }


def card(run: Run) -> Row | None:
    if not run.cuda:
        return None
    found = torch.cuda.get_device_properties(run.device)
    sizes = {
        "bytes": found.total_memory,
        "l2": found.L2_cache_size,
        "processors": found.multi_processor_count,
    }
    return {"name": found.name, "sm": f"{found.major}{found.minor}"} | sizes


def clocks() -> dict[str, str] | None:
    """nvidia-smi's fields; None where there is no such tool."""
    if shutil.which("nvidia-smi") is None:
        return None
    found = {}
    for field in QUERY:
        # one at a time: an unknown field would fail them all
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        found[field] = done.stdout.strip() if done.returncode == 0 else "unknown"
    return found


def table(found: list[Row], dry: bool) -> str:
    lines = []
    for r in found:
        value = r.get("value", r.get("failed"))
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        lines.append(f"{r['what']:<12} {text}")
    return "\n".join(lines)
