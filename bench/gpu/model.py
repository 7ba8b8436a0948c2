"""Stage model: training steps of a causal LM of Llama-3-8B's shape, and loss curves of a shallow one.

Steps: one frozen base, on which adapters (LoRA, rank 16, all seven linears of every layer) are put and taken
off in turn; each arm at two places of the order, as ratios to the frozen model of the same pass. All arms,
the frozen one too, compute dx down to the embeddings. The frozen arm has no optimiser.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.common import Row, Run, Task, shown
from bench.gpu.model_arms import (
    FROZEN,
    ModelArm,
    Size,
    adapted,
    base_dtype,
    build,
    free,
    large,
    model_arms,
    sequences,
    set_start,
    small,
    trained,
)

WARM_UP, STEPS = 2, 4
# after LEAST timed steps, no further one begins once an arm has had this long
LEAST, ARM_SECONDS = 3, 4.5
LENGTH = 2048
# checkpointing, sequences, passes; the last is the one that may not fit
SETTINGS = ((True, 4, 2), (False, 2, 2), (False, 4, 1))
LOSS_SEEDS, LOSS_STEPS, LOSS_BATCH, LOSS_LENGTH = (0, 1, 2), 40, 4, 512
RATE, LOSS_RATE = 1e-4, 1e-3
OUT_OF_MEMORY = "out of memory"


class Held:
    """The base model of this process, one at a time, made when first asked for."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.size: Size | None = None
        self.model: Any = None

    def get(self, size: Size) -> Any:
        if self.model is None or self.size != size:
            self.drop()
            self.model, self.size = build(self.run, size), size
        return self.model

    def drop(self) -> None:
        self.model = self.size = None
        free(self.run)


def tasks(run: Run) -> Iterator[Task]:
    held, arms = Held(run), model_arms(run)
    for arm in arms.values():
        if arm.library == "fastpeft" or arm.name in peft_in_loss(run):
            yield {"part": "loss", "arm": arm.name}, partial(curves, run, held, arm)
    for turn in range(max(passes for *_, passes in SETTINGS)):
        for checkpointing, batch, passes in SETTINGS:
            if turn >= passes:
                continue
            for arm in list(arms.values())[:: -1 if turn else 1]:
                head = {"part": "step", "checkpointing": checkpointing, "batch": batch, "pass": turn}
                work = partial(measured, run, held, arm, checkpointing, batch, turn)
                yield head | {"arm": arm.name}, work


def peft_in_loss(run: Run) -> list[str]:
    return [n for n, a in model_arms(run).items() if a.library == "PEFT" and (not a.wide or a.autocast)]


def optimizer_of(run: Run, parameters: list[Any], rate: float) -> Any:
    if not parameters:
        return None
    # squares of gradients underflow in the fp16 of a rehearsal
    return torch.optim.AdamW(parameters, lr=rate, fused=run.cuda, eps=1e-4 if run.dry else 1e-8)


def stepper(arm: ModelArm, model: Any, optimizer: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Forward, backward, AdamW, zero_grad; the loss, not waited for."""

    def call() -> Tensor:
        loss = arm.loss(model, tokens)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return call


def measured(run: Run, held: Held, arm: ModelArm, checkpointing: bool, batch: int, turn: int) -> Row:
    """Seconds of every timed step, by the wall and by events, and the allocator's peak."""
    base, row = held.get(large(run)), None
    free(run)
    try:
        row = _measured(run, held, base, arm, checkpointing, batch, turn)
    except torch.cuda.OutOfMemoryError:
        # what its frames hold is free only after this block
        pass
    free(run)
    return {"failed": OUT_OF_MEMORY} if row is None else row


def _measured(
    run: Run, held: Held, base: Any, arm: ModelArm, checkpointing: bool, batch: int, turn: int
) -> Row:
    size = large(run)
    shape = (2, 16) if run.dry else (batch, LENGTH)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(size.vocab, shape, generator=generator).to(run.device)
    with adapted(base, arm, held.drop) as model, arm.using():
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            own = trained(model)
            call = stepper(arm, model, optimizer_of(run, own, RATE), tokens)
            first = [float(call()) for _ in range(1 if turn else WARM_UP)]
            row = _clocked(run, call)
        finally:
            if checkpointing:
                base.gradient_checkpointing_disable()
    count = tokens.numel()
    row |= {
        "tokens": count,
        "layers": size.layers,
        "trainable": sum(p.numel() for p in own),
        "adapter_dtype": sorted({str(p.dtype).removeprefix("torch.") for p in own}),
        "losses": [*first, row["losses"]],
        "tokens_per_s": count / statistics.median(row["wall_s"]),
    }
    if not all(v == v and abs(v) != float("inf") for v in row["losses"]):
        row["failed"] = f"losses {row['losses']}"
    return row


def _clocked(run: Run, call: Callable[[], Tensor]) -> Row:
    """before_bytes: allocated before a step; activation_bytes: the peak above it."""
    wall: list[float] = []
    device: list[float] = []
    before, loss, began = 0, None, time.perf_counter()
    if run.cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    while len(wall) < STEPS and (len(wall) < LEAST or time.perf_counter() - began < ARM_SECONDS):
        start = time.perf_counter()
        if run.cuda:
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            loss = call()
            b.record()
            torch.cuda.synchronize()
            wall.append(time.perf_counter() - start)
            device.append(a.elapsed_time(b) / 1e3)
        else:
            loss = call()
            wall.append(time.perf_counter() - start)
            device.append(wall[-1])
    peak = torch.cuda.max_memory_allocated() if run.cuda else None
    assert loss is not None
    return {
        "wall_s": wall,
        "device_s": device,
        "losses": float(loss),
        "peak_bytes": peak,
        "before_bytes": before,
        "activation_bytes": None if peak is None else peak - before,
    }


def curves(run: Run, held: Held, arm: ModelArm) -> list[Row]:
    """A loss curve per seed; the seed is that of the adapter's start and of the walks."""
    size, steps = small(run), 3 if run.dry else LOSS_STEPS
    batch, length = (2, 16) if run.dry else (LOSS_BATCH, LOSS_LENGTH)
    base, rows = held.get(size), []
    for seed in LOSS_SEEDS:
        tokens = sequences(size, seed, steps * batch, length).to(run.device).split(batch)
        with adapted(base, arm, held.drop) as model, arm.using():
            set_start(model, seed, base_dtype(run))
            optimizer = optimizer_of(run, trained(model), LOSS_RATE)
            losses = [stepper(arm, model, optimizer, part)() for part in tokens]
            curve = [float(v) for v in losses]
        rows.append({"seed": seed, "curve": curve})
    free(run)
    return rows


def against(own: list[Row], base: list[Row], clock: str = "wall_s") -> float | None:
    """Median over the steps of own / the median of base, within the same pass."""
    middle = {r["pass"]: statistics.median(r[clock]) for r in base if "failed" not in r}
    found = [
        s / middle[r["pass"]] for r in own if "failed" not in r and r["pass"] in middle for s in r[clock]
    ]
    return statistics.median(found) if found else None


def table(found: list[Row], dry: bool) -> str:
    steps = [r for r in found if r["part"] == "step"]
    lines: list[str] = []
    for checkpointing, batch in dict.fromkeys((r["checkpointing"], r["batch"]) for r in steps):
        here = [r for r in steps if (r["checkpointing"], r["batch"]) == (checkpointing, batch)]
        lines += _steps_table(here, f"{'' if checkpointing else 'no '}checkpointing, batch {batch}", dry)
    return "\n".join(lines + _loss_table([r for r in found if r["part"] == "loss"], dry))


def _steps_table(here: list[Row], title: str, dry: bool) -> list[str]:
    head = f"{'tokens/s':>9}  {'time':>7}  {'device':>7}  {'peak':>6}  {'activations GB':>6}"
    lines = [f"{title + ', times to frozen':<44} {head}"]
    arms = {n: [r for r in here if r["arm"] == n] for n in dict.fromkeys(r["arm"] for r in here)}
    for name, rows in arms.items():
        failed = [f"pass {r['pass']}: FAILED {r['failed'][:110]}" for r in rows if "failed" in r]
        right = [r for r in rows if "failed" not in r]
        if right:
            numbers = [
                shown(statistics.median(r["tokens_per_s"] for r in right), dry, "9.0f"),
                shown(against(right, arms.get(FROZEN, [])), dry, "7.3f"),
                shown(against(right, arms.get(FROZEN, []), "device_s"), dry, "7.3f"),
                shown(_gb(right, "peak_bytes"), dry, "6.2f"),
                shown(_gb(right, "activation_bytes"), dry, "6.2f"),
            ]
            lines.append(f"  {name:<42} {'  '.join(numbers)}")
        lines += [f"  {name:<42} {f}" for f in failed]
    first = {r["losses"][0] for r in here if r.get("losses")}
    if first:
        lines.append(
            f"  first losses, where no adapter has begun: {shown(max(first) - min(first), dry, '.5f')} apart"
        )
    for name, rows in arms.items():
        rivals = {n: against(r, rows) for n, r in arms.items() if n.startswith("PEFT")}
        if name.startswith("fastpeft"):
            speed = "; ".join(f"{shown(v, dry, '.3f')} x {n}" for n, v in rivals.items())
            lines.append(f"  tokens/s of {name}: {speed}")
    return lines


def _gb(rows: list[Row], key: str) -> float | None:
    values = [r[key] / 1e9 for r in rows if r[key] is not None]
    return max(values) if values else None


def _loss_table(found: list[Row], dry: bool) -> list[str]:
    """Differences to PEFT's fp32 adapters under autocast, and the spread of that arm's own seeds."""
    lines = [f"loss, {r['arm']}: FAILED {r['failed'][:150]}" for r in found if "failed" in r]
    arms: dict[str, dict[int, list[float]]] = {}
    for r in found:
        if "failed" not in r:
            arms.setdefault(r["arm"], {})[r["seed"]] = r["curve"]
    base = next((c for n, c in arms.items() if "autocast" in n), {})
    for name, own in arms.items():
        first, last = (statistics.fmean(c[k] for c in own.values()) for k in (0, -1))
        gaps = [abs(a - b) for s in own if s in base for a, b in zip(own[s], base[s], strict=True)]
        text = f"loss, {name}: {shown(first, dry, '.4f')} to {shown(last, dry, '.4f')}"
        lines.append(
            f"{text}, at most {shown(max(gaps) if gaps else None, dry, '.5f')} from PEFT's fp32 under autocast"
        )
    if len(base) > 1:
        spreads = [max(v) - min(v) for v in zip(*base.values(), strict=True)]
        largest, mean = shown(max(spreads), dry, ".4f"), shown(statistics.fmean(spreads), dry, ".4f")
        lines.append(f"  that arm's own seeds lie up to {largest} apart, {mean} on average")
    return lines
