"""examples/sft_llama.py with fastpeft's one line and without it, side by side: step time, losses, memory.

    python examples/compare_sft.py                       # LoRA, DoRA and LoKr
    python examples/compare_sft.py --method dora --steps 60 --threads 1

Each arm is a process of its own that trains its own SFTTrainer, so its peak memory is its own; one of them works at a time. In
every round each arm takes one step, in an order drawn anew. A ratio is taken within a round, over the rounds after the warm-up.
The stock script runs twice: `stock again` is the A/A control, and a ratio inside its quartiles says nothing. The same model without
an adapter runs beside them: what stock takes over it is all that the one line can save.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_llama import METHODS, options

from fastpeft.job.measure import WARM_UP_STEPS, after_warm_up

SCRIPT = Path(__file__).with_name("sft_llama.py")
STOCK, AGAIN, OURS, FROZEN = "stock", "stock again", "accelerated", "frozen"
ARMS = {STOCK: "--no-accelerate", AGAIN: "--no-accelerate", OURS: "--accelerate", FROZEN: "--frozen"}


class Arm:
    """A training process that waits for its turn."""

    def __init__(self, flags: Sequence[str]):
        command = [sys.executable, str(SCRIPT), *flags, "--turns", "--json"]
        # a file: nobody reads a pipe of warnings while training runs
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)

    def line(self) -> Any:
        """What the process says next; RuntimeError with the last of its messages where it has ended instead."""
        assert self.process.stdout is not None
        if not (said := self.process.stdout.readline()):
            code = self.process.wait()
            self.errors.seek(0)
            tail = "\n".join(self.errors.read().splitlines()[-15:])
            raise RuntimeError(f"compare_sft: {' '.join(self.process.args)} ended with {code}:\n{tail}")
        return json.loads(said)

    def go(self) -> Any:
        """Let it take its next step, and wait until it is ready for another."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.line()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def trained(flags: Sequence[str], rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """The results of all arms, in turns; seconds[k] of each belongs to round k."""
    draw = random.Random(seed)
    arms: dict[str, Arm] = {}
    try:
        for name, flag in ARMS.items():
            arms[name] = Arm([*flags, flag])
            assert arms[name].line() == 0
        for k in range(rounds):
            for name in draw.sample(sorted(arms), len(arms)):
                assert arms[name].go() == k + 1
        return {name: arm.go() for name, arm in arms.items()}
    finally:
        for arm in arms.values():
            arm.close()


def ratios(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of value / base within a round; the warm-up is left out."""
    found = after_warm_up([v / b for v, b in zip(values, base, strict=True)])
    return tuple(statistics.quantiles(found, n=4, method="inclusive")) if len(found) > 1 else (found[0],) * 3  # type: ignore[return-value]


def compared(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """speedup: of the one line, (first quartile, median, third); control: of the stock script over itself; cpu: on the processor's
    clock; to_frozen: over the model without an adapter. loss: the largest difference over all steps. saved, peak: bytes."""
    stock, again, ours, frozen = (results[name] for name in ARMS)
    return {
        "method": ours["method"],
        "adapter_dtype": {STOCK: stock["adapter_dtype"], OURS: ours["adapter_dtype"]},
        "seconds": {name: statistics.median(after_warm_up(r["seconds"])) for name, r in results.items()},
        "speedup": ratios(stock["seconds"], ours["seconds"]),
        "control": ratios(stock["seconds"], again["seconds"]),
        "cpu_speedup": ratios(stock["cpu_seconds"], ours["cpu_seconds"]),
        "cpu_control": ratios(stock["cpu_seconds"], again["cpu_seconds"]),
        "to_frozen": {name: ratios(r["seconds"], frozen["seconds"]) for name, r in ((STOCK, stock), (OURS, ours))},
        "loss": max(abs(a - b) for a, b in zip(stock["losses"], ours["losses"], strict=True)),
        "loss_control": max(abs(a - b) for a, b in zip(stock["losses"], again["losses"], strict=True)),
        "losses": {name: (r["losses"][0], r["losses"][-1]) for name, r in results.items()},
        "saved": {name: r["saved"] for name, r in results.items()},
        "peak_resident": {name: r["peak_resident"] for name, r in results.items()},
        "loaded": {name: r["loaded"] for name, r in results.items()},
        "fused_calls": {name: r["fused_calls"] for name, r in results.items()},
        "peft_calls": {name: r["peft_calls"] for name, r in results.items()},
    }


def show(c: dict[str, Any]) -> str:
    def three(found: Sequence[float]) -> str:
        return f"{found[1]:.3f} [{found[0]:.3f}, {found[2]:.3f}]"

    def each(values: dict[str, float], unit: float, digits: int) -> str:
        return " | ".join(f"{values[name] / unit:.{digits}f}" for name in ARMS)

    first, last = c["losses"][STOCK]
    return "\n".join(
        (
            f"\n{c['method']}: adapter in {c['adapter_dtype'][STOCK]} under PEFT; fused forwards {c['fused_calls'][OURS]}",
            f"{'':24}{' | '.join(ARMS)}",
            f"{'step, ms':24}{each(c['seconds'], 1e-3, 1)}",
            f"{'saved for backward, MiB':24}{each(c['saved'], 2**20, 1)}",
            f"{'peak, MiB':24}{each(c['peak_resident'], 2**20, 0)}   (before the first step {each(c['loaded'], 2**20, 0)})",
            f"speed-up {three(c['speedup'])}; A/A control {three(c['control'])}   (median and quartiles over the rounds)",
            f"over the frozen model: stock {three(c['to_frozen'][STOCK])}, accelerated {three(c['to_frozen'][OURS])}",
            f"on the processor's clock {three(c['cpu_speedup'])}; A/A {three(c['cpu_control'])}",
            f"loss {first:.4f} -> {last:.4f}, largest difference {c['loss']:.1e} (A/A {c['loss_control']:.1e})",
        )
    )


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """The comparison of each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, action="append", help="once or more; all three by default")
    options(parser)
    parser.add_argument("--json", action="store_true", help="print a line of JSON per method")
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps {args.steps}; the first {WARM_UP_STEPS} are warm-up, so give more")
    own = {k: v for k, v in vars(args).items() if k not in ("method", "json", "checkpointing")}
    flags = [f"--{k}={v}" for k, v in own.items()] + ["--checkpointing"] * args.checkpointing
    found = []
    for method in args.method or METHODS:
        found.append(compared(trained([f"--method={method}", *flags], args.steps, args.seed)))
        print(json.dumps(found[-1]) if args.json else show(found[-1]), flush=True)
    return found


if __name__ == "__main__":
    main()
