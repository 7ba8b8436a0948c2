"""Routed adapters on three domains of text: python -m bench.routed [--pilot] [--seeds 0 1 2] [--plot].

Domains are docstrings, comments and code of the standard library (bench.forms), a text's label the number of its package *within* its
domain: every domain gives the same three answers another meaning, as tasks that share one vocabulary do. All arms start from one
model whose head was trained on the mixture over the frozen encoder; after that only adapters train. Arms, one line each to
bench/results/routed.jsonl with accuracy per domain and on all held-out texts (the mixture):

  frozen; one LoRA per domain ("expert ..."), judged everywhere; weight averaging of the three; MoA over them (routers alone train);
  PHATGOOSE over them (a gate each, trained on its own domain, then routing with k = 1, 2, 3);
  one LoRA on the mixture of the same rank;
  HydraLoRA on the mixture at two sizes, and a LoRA of at least as many numbers beside each.

Every text is seen equally often by every LoRA and HydraLoRA that learns from it; routers and gates have epochs of their own. --pilot: the mixture's arms with each of LRS on seed 100, which
is not reported; each has its best rate there in all other runs (the experts that of LoRA 8). A run that the file holds is not made again.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fastpeft
from bench.machine import RESULTS, emit, read_rows
from bench.mixture import ALL, DOMAINS, Bench
from fastpeft.domains import choices
from fastpeft.job.loop import is_own
from fastpeft.job.settings import Settings

FILE = RESULTS / "routed.jsonl"
EPOCHS, MAX_LENGTH, PILOT_SEED, SEEDS = 3, 32, 100, (0, 1, 2)
LRS = (2e-3, 4e-3)
RANK, HEAD_LR, ROUTER_LR, GATE_LR = 8, 2e-3, 1e-2, 5e-3
GATE_EPOCHS = 5  # some 110 steps; published are 100, at this rate
# what trains on the mixture: title -> (method, options); scale 2 throughout
MIXTURE: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA 8": ("lora", {"rank": RANK, "alpha": 2 * RANK}),
    "LoRA 6": ("lora", {"rank": 6, "alpha": 12}),
    "HydraLoRA 2x3": ("hydralora", {"rank": 2, "alpha": 4, "heads": 3}),
    # the published rank and number of heads
    "LoRA 19": ("lora", {"rank": 19, "alpha": 38}),
    "HydraLoRA 8x3": ("hydralora", {"rank": 8, "alpha": 16, "heads": 3}),
}
def mixture(bench: Bench, title: str, lr: float, seed: int, start: Any) -> None:
    """One arm that learns from the mixture."""
    method, options = MIXTURE[title]
    # routers of moa apart, nothing is told the domain
    data = replace(bench.data[ALL], domains=None)
    model = bench.fit(start, method, options, data, bench.held[ALL], lr, seed, EPOCHS)
    own = sum(p.numel() for n, p in model.named_parameters() if is_own(n))
    _emit(bench, title, seed, {"lr": lr, "method": method, "options": options, "trainable": own} | bench.judge(model))


def experts(bench: Bench, lr: float, seed: int, start: Any) -> None:
    """The experts, and everything that is made of them; their rows come together."""
    rows: dict[str, dict[str, Any]] = {"frozen": bench.judge(start)}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in DOMAINS}
        weights: list[dict[str, torch.Tensor]] = []
        for z, name in enumerate(DOMAINS):
            data = replace(bench.data[name], domains=None)
            model = bench.fit(start, "lora", MIXTURE["LoRA 8"][1], data, bench.held[name], lr, seed + 10 * (z + 1), EPOCHS)
            fastpeft.save_adapter(model, folders[name])
            rows[f"expert {name}"] = {"lr": lr} | bench.judge(model)
            weights.append(fastpeft.merge(model).state_dict())
        average = copy.deepcopy(start)
        average.load_state_dict({k: torch.stack([w[k] for w in weights]).mean(0) if v.is_floating_point() else v for k, v in weights[0].items()})
        rows["weight averaging"] = bench.judge(average)
        options = {"experts": {n: str(f) for n, f in folders.items()}, "train_experts": False}
        model = bench.fit(start, "moa", options, bench.data[ALL], bench.held[ALL], ROUTER_LR, seed, 1)
        rows["MoA"] = {"lr": ROUTER_LR, "by_block": by_block(bench, model)} | bench.judge(model)
        gated = {}
        for name in DOMAINS:
            data = replace(bench.data[name], domains=None)
            options = {"experts": {name: str(folders[name])}, "stage": "gate"}
            model = bench.fit(start, "phatgoose", options, data, bench.held[name], GATE_LR, seed, GATE_EPOCHS)
            gated[name] = str(folders[name]) + " gated"
            fastpeft.save_adapter(model, gated[name])
        for k in (1, 2, 3):
            model = copy.deepcopy(start)
            fastpeft.adapt(model, "phatgoose", experts=gated, k=k)
            rows[f"PHATGOOSE k={k}"] = {"lr": GATE_LR} | bench.judge(model)
    for title, row in rows.items():
        _emit(bench, title, seed, row)


@torch.no_grad()
def by_block(bench: Bench, model: Any) -> dict[str, float]:
    """Of each block the share of held-out texts whose router chooses their domain."""
    held, right = bench.held[ALL], {}
    model.eval()
    for batch in held.in_order(2 * bench.base.batch_size):
        domain = batch.pop("domain")
        model(**batch)
        for block, choice in choices(model).items():
            right[block] = right.get(block, 0) + int((choice == domain).sum())
    return {block: n / len(held) for block, n in right.items()}


def _emit(bench: Bench, title: str, seed: int, row: dict[str, Any]) -> None:
    head = {"bench": "routed", "arm": title, "seed": seed, "epochs": EPOCHS, "max_length": MAX_LENGTH}
    sizes = {name: [len(bench.data[name]), len(bench.held[name])] for name in bench.held}
    emit(head | row | {"examples": sizes}, None if bench.base.quick else FILE)


def read() -> list[dict[str, Any]]:
    return [r for r in read_rows(FILE) if (r["epochs"], r["max_length"]) == (EPOCHS, MAX_LENGTH)]


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Arm -> its learning rate of the lowest loss on the mixture, in the pilot."""
    pilot = [r for r in rows if r["seed"] == PILOT_SEED]
    found = {}
    for title in MIXTURE:
        own = {r["lr"]: r["loss"][ALL] for r in pilot if r["arm"] == title}
        if not set(LRS) <= set(own):
            raise SystemExit(f"bench.routed: the pilot of {title} lacks learning rates; run --pilot first.")
        found[title] = min(LRS, key=lambda lr: own[lr])
    return found


def table() -> str:
    lines = [f"| arm | learning rate | {' | '.join(DOMAINS)} | {ALL} | by seed |", f"| --- | ---: |{' ---: |' * (len(DOMAINS) + 1)} --- |"]
    for title, rows in by_arm().items():
        means = [statistics.fmean(r["accuracy"][d] for r in rows) for d in (*DOMAINS, ALL)]
        each = ", ".join(f"{r['accuracy'][ALL]:.3f}" for r in rows)
        lines.append(f"| {title} | {rows[0].get('lr', '')} | {' | '.join(f'{m:.3f}' for m in means)} | {each} |")
    routers = by_arm().get("MoA", [])
    if routers:
        blocks = {b.rsplit(".", 1)[-1]: statistics.fmean(r["by_block"][b] for r in routers) for b in routers[0]["by_block"]}
        shares = ", ".join(f"{b}: {s:.3f}" for b, s in blocks.items())
        lines.append(f"\nMoA's routers choose the text's domain in {statistics.fmean(r['router'][ALL] for r in routers):.3f}; by block {shares}.")
    return "\n".join(lines)


def by_arm() -> dict[str, list[dict[str, Any]]]:
    """Arm -> its rows of SEEDS, in a fixed order."""
    found: dict[str, list[dict[str, Any]]] = {}
    order = ["frozen", *(f"expert {d}" for d in DOMAINS), "weight averaging", "PHATGOOSE k=1", "PHATGOOSE k=2", "PHATGOOSE k=3", "MoA", *MIXTURE]
    for r in sorted((r for r in read() if r["arm"] in order), key=lambda r: (order.index(r["arm"]), r["seed"])):
        if r["seed"] in SEEDS:
            found.setdefault(r["arm"], []).append(r)
    return found


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = by_arm()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained", width_ratios=(3, 2))
    width = 0.8 / max(1, len(arms))
    for k, (title, rows) in enumerate(arms.items()):
        xs = [j + (k - len(arms) / 2) * width for j in range(len(DOMAINS))]
        left.bar(xs, [statistics.fmean(r["accuracy"][d] for r in rows) for d in DOMAINS], width, label=title, color=plt.get_cmap("tab20")(k))
        right.barh(-k, statistics.fmean(r["accuracy"][ALL] for r in rows), color=plt.get_cmap("tab20")(k))
        right.plot([r["accuracy"][ALL] for r in rows], [-k] * len(rows), "k.", ms=4)
    left.set(xticks=range(len(DOMAINS)), xticklabels=DOMAINS, ylabel="accuracy on the domain", ylim=(0.2, 1))
    left.legend(ncols=3, fontsize=7)
    right.set(yticks=[-k for k in range(len(arms))], yticklabels=list(arms), xlabel="accuracy on the mixture (dots: seeds)", xlim=(0.2, 1))
    figure.savefig(FILE.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--pilot", action="store_true")
    parser.add_argument("--arms", nargs="+", choices=[*MIXTURE], help="of the mixture alone; default: all, and the experts")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--quick", action="store_true", help="few texts, kept nowhere: does it run?")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.pilot or args.seeds or args.quick:
        bench = Bench(Settings(compare=False, threads=args.threads, quick=args.quick, epochs=1 if args.quick else EPOCHS, max_length=MAX_LENGTH))
        done = {(r["arm"], r["seed"], r.get("lr")) for r in read()}
        if args.pilot:
            start = bench.with_trained_head(PILOT_SEED, HEAD_LR)
            for title in MIXTURE:
                for lr in LRS:
                    if (title, PILOT_SEED, lr) not in done:
                        mixture(bench, title, lr, PILOT_SEED, start)
        rates = dict.fromkeys(MIXTURE, LRS[1]) if args.quick else best_rates(read())
        for seed in args.seeds or ([0] if args.quick else []):
            start = bench.with_trained_head(seed, HEAD_LR)
            if not args.arms and ("MoA", seed, ROUTER_LR) not in done:
                experts(bench, rates["LoRA 8"], seed, start)
            for title, lr in rates.items():
                if (not args.arms or title in args.arms) and (title, seed, lr) not in done:
                    mixture(bench, title, lr, seed, start)
    if args.plot:
        plot()
    if not args.quick:
        print(table())


if __name__ == "__main__":
    main()
