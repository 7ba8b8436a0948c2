"""Everything that waits for a GPU, in stages; each writes its JSON to $OUT and is skipped once that is there.

python -m bench.gpu_run [--stages correctness,ceilings] [--device cuda] rehearsal without a GPU: --device cpu
--dry: tiny sizes, Triton's interpreter, fp32 and fp16; it measures nothing
--jobs 14: before the stages in turn, all that they check and do not time is checked by so many processes at once
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = (
    "build", "correctness", "sanitizer", "parts", "recipes", "ceilings", "products", "kernels", "tiles", "layers", "structured", "part_nf4",
    "part_grouped", "memory", "model",
)  # fmt: skip
MINUTES = 7.5
# checks that hold times too
TIMED = ("time", "switch", "ratio to the dense base")


def run_stage(stage: str, run: Any, checks: bool = False) -> dict[str, Any]:
    """What the stage found: read where its JSON is there, else worked out task by task; with `checks` what is known only.

    Finished tasks lie in a .part file, so a stage that ran out of time, or was killed, goes on where it
    stopped.
    """
    from bench.gpu.common import file_stem, finish
    from bench.machine import machine

    path = run.out / f"{file_stem(stage, run.device, run.dry)}.json"
    if path.exists():
        return json.loads(path.read_text())
    part, start = path.with_suffix(".part"), time.monotonic()
    lines = part.read_text().splitlines() if part.exists() else []
    done = {json.dumps(d["head"]): d["rows"] for d in (json.loads(s) for s in lines if s.endswith("}"))}
    stopped, rows = None, []
    with part.open("w") as file:
        for head, known in done.items():
            _keep(file, json.loads(head), known)
        for head, work in importlib.import_module(f"bench.gpu.{stage}").tasks(run):
            if json.dumps(head) in done:
                continue
            if checks and stage != "build":
                stopped = "only the checks were asked for"
                break
            if stopped := _stop(run, rows):
                break
            done[json.dumps(head)] = rows = finish(head, work)
            _keep(file, head, rows)
    whole = {"stage": stage, "device": run.device, "dry": run.dry, "stopped": stopped}
    whole |= {
        "seconds": time.monotonic() - start,
        **machine(),
        "rows": [r for rows in done.values() for r in rows],
    }
    if stopped is None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(whole, indent=1))
        new.replace(path)
        part.unlink()
    return whole


def is_check(head: dict[str, Any]) -> bool:
    """Whether a task times nothing, so that others may run beside it."""
    return "tool" in head or ("check" in head and head["check"] not in TIMED)


def share(stages: list[str], part: int, parts: int, run: Any) -> None:
    """Of every `parts` checks of the stages one: what was found lies in <stage>.share<part>."""
    from bench.gpu.common import file_stem, finish

    count = 0
    for stage in stages:
        path = run.out / f"{file_stem(stage, run.device, run.dry)}.share{part}"
        with path.open("w") as file:
            for head, work in importlib.import_module(f"bench.gpu.{stage}").tasks(run):
                if not is_check(head):
                    continue
                count += 1
                if count % parts != part:
                    continue
                rows = finish(head, work)
                _keep(file, head, rows)
                if _stop(run, rows):
                    return


def check_at_once(stages: list[str], jobs: int, run: Any, more: list[str]) -> None:
    """All checks of the stages by `jobs` processes; what they found becomes the stages' .part files."""
    from bench.gpu.common import file_stem

    wanted = [s for s in stages if not (run.out / f"{file_stem(s, run.device, run.dry)}.json").exists()]
    command = [sys.executable, "-m", "bench.gpu_run", "--stages", ",".join(wanted), *more, "--share"]
    one = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "OUT": str(run.out)}
    running = []
    for k in range(jobs):
        log = (run.out / f"share{k}.log").open("w")
        running.append(subprocess.Popen([*command, f"{k}/{jobs}"], env=one, stdout=log, stderr=log))
    for process in running:
        try:
            process.wait(max(1.0, run.deadline + 30 - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    for stage in wanted:
        stem = file_stem(stage, run.device, run.dry)
        with (run.out / f"{stem}.part").open("a") as part:
            for found in sorted(run.out.glob(f"{stem}.share*")):
                part.writelines(line for line in found.read_text().splitlines(True) if line.endswith("}\n"))
                found.unlink()


def _keep(file: Any, head: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    file.write(json.dumps({"head": head, "rows": rows}) + "\n")
    file.flush()


def _stop(run: Any, last: list[dict[str, Any]]) -> str | None:
    """Why no further task begins; last: the rows of this process's latest task."""
    from bench.gpu.common import spoiled

    if run.late():
        return "out of time"
    return "the device failed" if any(spoiled(r.get("failed", "")) for r in last) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry", action="store_true", help="a rehearsal")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}, by comma")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="after which a stage begins nothing new"
    )
    parser.add_argument("--jobs", type=int, default=0, help="processes that do the checks first, side by side")
    parser.add_argument("--checks", action="store_true", help="with --jobs: nothing but the checks")
    parser.add_argument("--share", help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = args.stages.split(",")
    if unknown := set(wanted) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if args.dry and args.device != "cpu":
        parser.error("--dry rehearses on the CPU; add --device cpu")
    if args.dry:
        # before anything imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.gpu.common import Run

    out = Path(os.environ.get("OUT", "build/gpu_run"))
    out.mkdir(parents=True, exist_ok=True)
    tables = []
    run = Run(args.device, args.dry, out, time.monotonic() + 60 * args.minutes)
    if args.share:
        part, parts = map(int, args.share.split("/"))
        return share(wanted, part, parts, run)
    if args.jobs:
        more = ["--device", args.device, "--minutes", str(args.minutes), *(["--dry"] if args.dry else [])]
        check_at_once(wanted, args.jobs, run, more)
    for stage in STAGES:
        if stage in wanted:
            run = Run(args.device, args.dry, out, time.monotonic() + 60 * args.minutes)
            found = run_stage(stage, run, args.checks)
            stopped = f", stopped: {found['stopped']}; run it again to go on" if found["stopped"] else ""
            print(f"{stage}: {len(found['rows'])} rows, {found['seconds']:.0f} s{stopped}", flush=True)
            tables.append(
                f"== {stage}\n" + importlib.import_module(f"bench.gpu.{stage}").table(found["rows"], args.dry)
            )
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    main()
