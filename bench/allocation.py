"""What ALoRA's allocation does: python -m bench.allocation [--built] [--seeds 0 1 2] [--plot].

--built: tasks that one type of module alone can solve exactly. A teacher is a small random BERT with an update of rank 4 in the query (or
value, or second feed-forward) weights of each of its blocks; the student is the BERT without it, with alora_alloc of rank 2 in all
six types of linear layer, and learns the teacher's last hidden states. The ranks should move to that type. Beside it LoRA of rank 2
everywhere, which has as many ranks, and LoRA of rank 4 in the right type alone, which can be exact.

--seeds: the main job, ALoRA of rank 2 beside LoRA of rank 2, trained together on the same examples: the tenth of them that ALoRA's
scores need, LoRA does not see either. A round costs two passes per live rank, some 150 here, so there are four, on 16 examples each,
and texts are cut at 24 tokens, half of the job's own length.

One line per run to bench/results/allocation.jsonl; a run that the file holds is not made again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft
from bench.machine import RESULTS, emit, read_rows
from fastpeft import train as procedures
from fastpeft.job.arms import FASTPEFT
from fastpeft.job.bench import Bench
from fastpeft.job.history import History, module_type
from fastpeft.job.loop import train, trainee
from fastpeft.job.settings import Settings
from fastpeft.method.alora_alloc import live_parameters

FILE = RESULTS / "allocation.jsonl"
TEACHERS = ("attention.self.query", "attention.self.value", "output.dense")
BLOCKS, TRUE_RANK, RANK, CAPACITY = 2, 4, 2, 8
STEPS, WARMUP, INTERVAL, ROUNDS, PER_ROUND = 600, 100, 50, 8, 4
LR = 1e-2
JOB, LENGTH = {"rank": 2, "alpha": 4}, 24
JOB_ROUNDS = {"warmup": 60, "interval": 20, "rounds": 4, "ranks_per_round": 8}


class Student(nn.Module):
    """A BERT whose loss is the mean squared distance of its last hidden states from the targets [batch, tokens, width]."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.bert(input_ids=ids).last_hidden_state - target).square().mean()}


def small_bert(seed: int) -> nn.Module:
    """Random weights of unit gain, so that every module matters."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.125,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


def teacher_of(bert: nn.Module, kind: str, seed: int) -> nn.Module:
    """A copy with an update of TRUE_RANK, half as large as the weight, in each module of the type."""
    teacher, generator = copy.deepcopy(bert), torch.Generator().manual_seed(seed)
    for name, m in teacher.named_modules():
        if isinstance(m, nn.Linear) and module_type(name) == kind:
            out, into = m.weight.shape
            update = torch.randn(out, TRUE_RANK, generator=generator) @ torch.randn(TRUE_RANK, into, generator=generator)
            m.weight.data += update * (m.weight.norm() / update.norm() / 2).detach()
    return teacher


def batches(teacher: nn.Module, seed: int, k: int, rows: int = 32) -> dict[str, Tensor]:
    """Batch k: token ids [rows, 16] and the teacher's states of them."""
    ids = torch.randint(0, 100, (rows, 16), generator=torch.Generator().manual_seed(1_000_003 * seed + k))
    with torch.no_grad():
        return {"ids": ids, "target": teacher(input_ids=ids).last_hidden_state}


def built(title: str, kind: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train one student; the row."""
    bert = small_bert(seed).eval()
    teacher = teacher_of(bert, kind, seed)
    model = Student(bert)
    own: list[procedures.Procedure] = []
    torch.manual_seed(seed)
    # one scale for all: alpha / rank is 2
    if title == "ALoRA":
        fastpeft.adapt(model, "alora_alloc", rank=RANK, alpha=2 * RANK, capacity=CAPACITY)
        source = functools.partial(batches, teacher, seed + 100)
        own = [procedures.ALoRAAllocation(source, warmup=WARMUP, interval=INTERVAL, rounds=ROUNDS, ranks_per_round=PER_ROUND, seed=seed)]
    elif title == "LoRA":
        fastpeft.adapt(model, "lora", rank=RANK, alpha=2 * RANK)
    else:
        where = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and module_type(n) == kind]
        fastpeft.adapt(model, "lora", rank=TRUE_RANK, alpha=2 * TRUE_RANK, target_modules=where)
    optimizer = procedures.build_optimizer(model, own, torch.optim.AdamW, lr=LR, weight_decay=0.0)
    history = History()
    with procedures.attach(model.train(), optimizer, own) as runner:
        for p in own:
            history.record(0, p.progress())
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - step / steps)
            model(**batches(teacher, seed, step))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            runner.step_end()
            for p in own:
                history.record(step + 1, p.progress())
    model.eval()
    with torch.no_grad():
        loss = statistics.fmean(float(model(**batches(teacher, seed + 200, k, 128))["loss"]) for k in range(4))
        base = Student(small_bert(seed).eval())
        before = statistics.fmean(float(base(**batches(teacher, seed + 200, k, 128))["loss"]) for k in range(4))
    row = {"bench": "allocation", "kind": "built", "title": title, "teacher": kind, "seed": seed, "steps": steps, "loss": loss}
    return row | {"loss_before": before, "history": history.changes}


def job(bench: Bench, seed: int) -> list[dict[str, Any]]:
    """ALoRA and LoRA on the main job, trained together."""
    entries = {"ALoRA": ("alora_alloc", JOB_ROUNDS), "LoRA": ("lora", {})}
    trainees = {}
    for title, (method, more) in entries.items():
        fields = {"method": method, "options": JOB, "procedure_options": {} if bench.base.quick else more, "seeds": (seed,)}
        settings = Settings(**(bench.base.as_dict() | fields))
        trainees[title] = trainee(bench.arm(FASTPEFT, settings, seed), settings)
    train(list(trainees.values()), bench.data, bench.held, settings, seed=seed)
    rows = []
    for title, t in trainees.items():
        adapter = [p for n, p in t.arm.model.named_parameters() if ".adapter." in n]
        size = live_parameters(t.arm.model) if title == "ALoRA" else sum(p.numel() for p in adapter)
        row = {"bench": "allocation", "kind": "job", "title": title, "options": JOB, "procedure": entries[title][1], "seed": seed}
        row |= {"epochs": settings.epochs, "steps": len(t.losses), "lr": settings.lr, "numbers": size, "aside": trainees["ALoRA"].aside}
        row |= {"accuracies": [s.accuracy for s in t.scores], "losses": [s.loss for s in t.scores], "examples": len(bench.held)}
        rows.append(row | {"history": t.histories["ranks"].changes if title == "ALoRA" else []})
    return rows


def read(kind: str) -> list[dict[str, Any]]:
    return [r for r in read_rows(FILE) if r["kind"] == kind]


def ends(row: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Ranks by type at first and at the end."""
    points = History(row["history"]).by_type(sum)
    return {n: p[0][1] for n, p in points.items()}, {n: p[-1][1] for n, p in points.items()}


def tables() -> str:
    lines = ["| only this type can | ranks in it, at first and at the end of each seed | in the other types, mean | ALoRA's loss | LoRA's | LoRA's, in it alone | before |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for kind in TEACHERS:
        rows = [r for r in read("built") if r["teacher"] == kind]
        moved = [ends(r) for r in rows if r["title"] == "ALoRA"]
        if not moved:
            continue
        own = f"{moved[0][0][kind]} -> {', '.join(str(last[kind]) for _, last in moved)}"
        others = [n for n in moved[0][0] if n != kind]
        rest = ", ".join(f"{n} {statistics.fmean(last[n] for _, last in moved):.1f}" for n in others)
        found = [[r["loss"] for r in rows if r["title"] == t] for t in ("ALoRA", "LoRA", "LoRA, right type")]
        losses = [f"{statistics.fmean(f):.4f}" if f else "" for f in found]
        before = statistics.fmean(r["loss_before"] for r in rows)
        lines.append(f"| {kind} | {own} | {rest} | {' | '.join(losses)} | {before:.3f} |")
    jobs = [r for r in read("job") if r["title"] == "ALoRA"]
    if jobs:
        lines += ["", "| main job | numbers in use at the end | loss | accuracy | per seed |", "| --- | ---: | ---: | ---: | --- |"]
        for title in ("ALoRA", "LoRA"):
            rows = [r for r in read("job") if r["title"] == title]
            numbers, loss = (statistics.fmean(values) for values in ([r["numbers"] for r in rows], [r["losses"][-1] for r in rows]))
            each = [r["accuracies"][-1] for r in rows]
            listed = ", ".join(f"{a:.3f}" for a in each)
            lines.append(f"| {title} | {numbers:,.0f} | {loss:.3f} | {statistics.fmean(each):.3f} | {listed} |")
        lines += ["", "| ranks on the main job | at first | at the end of each seed |", "| --- | ---: | --- |"]
        first = ends(jobs[0])[0]
        for name in first:
            lines.append(f"| {name} | {first[name]} | {', '.join(str(ends(r)[1][name]) for r in jobs)} |")
    return "\n".join(lines)


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {f"only {kind} can": [r for r in read("built") if r["teacher"] == kind and r["title"] == "ALoRA"] for kind in TEACHERS}
    panels["main job"] = [r for r in read("job") if r["title"] == "ALoRA"]
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 4), layout="constrained")
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        colours: dict[str, str] = {}
        for r in rows:
            for name, points in History(r["history"]).by_type(sum).items():
                xs, ys = zip(*points, (r["steps"], points[-1][1]), strict=True)
                style = {"lw": 2, "label": name} if name not in colours else {"lw": 0.8, "alpha": 0.6}
                axis.plot(xs, ys, drawstyle="steps-post", color=colours.setdefault(name, f"C{len(colours)}"), **style)
        axis.set(title=title, xlabel="step", ylabel="ranks in use, all layers of a type")
        axis.legend(fontsize=7)
    figure.savefig(FILE.with_suffix(".png"), dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", action="store_true", help="the built tasks, at seeds 0 1 2")
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="of the main job")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few steps, nothing kept: does it run?")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    file = None if args.quick else FILE
    if args.built:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        done = {(r["title"], r["teacher"], r["seed"]) for r in read("built")}
        for seed in (0, 1, 2):
            for kind in TEACHERS:
                for title in ("ALoRA", "LoRA", "LoRA, right type"):
                    if (title, kind, seed) not in done or args.quick:
                        emit(built(title, kind, seed, 250 if args.quick else STEPS), file)
    if args.seeds:
        bench = Bench(Settings(compare=False, threads=args.threads, quick=args.quick, max_length=LENGTH, epochs=1 if args.quick else 3))
        done_jobs = {r["seed"] for r in read("job")}
        for seed in args.seeds:
            for row in job(bench, seed) if seed not in done_jobs or args.quick else ():
                emit(row, file)
    if args.plot:
        plot()
    print(tables())


if __name__ == "__main__":
    main()
