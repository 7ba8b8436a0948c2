"""Peak memory of one arm, measured in a fresh process of its own: `python -m fastpeft.job.memory <
spec.json`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch

from fastpeft.job.arms import build_arms
from fastpeft.job.errors import JobError
from fastpeft.job.loop import train_step, trainee
from fastpeft.job.measure import LONG_RUN
from fastpeft.job.models import Source, load_model
from fastpeft.job.procedures import without_source
from fastpeft.job.settings import Settings

STEPS = 5
QUICK_STEPS = 2


def peak_resident() -> int:
    """Highest resident memory of this process so far, in bytes.

    On Linux VmHWM, which starts anew with the program: ru_maxrss of a child starts at its parent's peak,
    because exec hands the old program's high-water mark on, and would show the parent's size for every arm.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(
    arm: str,
    source: Source,
    settings: Settings,
    batch: dict[str, Any],
    *,
    classes: list[str] | None,
    pad: int,
) -> dict[str, int]:
    """Run the arm's steps on `batch` in a new process. Returns bytes: `loaded` before the first step, `peak`,
    `cuda_peak`.

    Both contain the interpreter, the libraries and the model; peak adds the adapter, gradients, optimiser
    state, activations and what the allocator keeps. cuda_peak is the device's share (0 on the CPU).
    """
    spec = {
        "arm": arm,
        "source": asdict(source),
        "settings": settings.as_dict(),
        "classes": classes,
        "pad": pad,
        "batch": {k: v.tolist() for k, v in batch.items()},
    }
    done = subprocess.run(
        [sys.executable, "-m", "fastpeft.job.memory"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise JobError(
            f"finetune: the process that measures the memory of {arm} failed (code {done.returncode}): "
            f"{last}",
            code=1,
        )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _run(spec: dict[str, Any]) -> dict[str, int]:
    fields = spec["settings"]
    targets = fields["target_modules"]
    fields["target_modules"] = targets if isinstance(targets, str) else tuple(targets)
    settings = Settings(**(fields | {k: tuple(fields[k]) for k in ("seeds", "procedures")}))
    torch.set_num_threads(settings.thread_count)
    batch = {k: torch.tensor(v, device=settings.torch_device) for k, v in spec["batch"].items()}
    seed = settings.seeds[0]
    model, new = load_model(
        Source(**spec["source"]), settings, classes=spec["classes"], pad=spec["pad"], seed=seed
    )
    [arm] = build_arms([spec["arm"]], model, new, settings, seed=seed)
    arm.model.train()
    loaded = peak_resident()
    for procedure in without_source(arm.procedures):
        procedure.source = [batch]  # only the size matters here
    t = trainee(arm, settings, total_steps=LONG_RUN)
    with contextlib.nullcontext() if t.runner is None else t.runner:
        for _ in range(QUICK_STEPS if settings.quick else STEPS):
            train_step(t, batch, settings.lr, settings)
    cuda = torch.cuda.max_memory_allocated() if settings.torch_device.startswith("cuda") else 0
    return {"loaded": loaded, "peak": peak_resident(), "cuda_peak": cuda}


if __name__ == "__main__":
    print(json.dumps(_run(json.load(sys.stdin))))
