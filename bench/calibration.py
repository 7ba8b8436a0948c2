"""Laplace-LoRA on an over-trained classifier: python -m bench.calibration [--seeds 0 1 2] [--threads N] [--table] [--quick].

The main job's encoder and text, with LoRA where the paper has it (queries and values, rank 8, alpha 16, weight decay 0; no dropout):
200 training examples of 24 tokens by heart in 20 epochs, 50 held-out ones for what needs them, judged on the job's 239 evaluation
examples. Beside the trained model (map): its temperature scaled on the held-out examples, and the posterior's predictive (probit, mc)
with the factors of all layers or of the last one random, and the prior precision from the evidence or from the held-out examples; for
seed 0 also from training examples that are held out of the fit alone (seen). One line per seed to bench/results/calibration.jsonl,
then the plot and a table. A seed draws the examples, the start and the order.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import RESULTS, emit, read_rows
from fastpeft import laplace
from fastpeft.job.arms import FASTPEFT, build_arms
from fastpeft.job.data import Examples, encode, load_texts
from fastpeft.job.loop import train, trainee
from fastpeft.job.models import find_model, load_model, load_tokenizer
from fastpeft.job.settings import Settings
from fastpeft.job.split import near_copies, split

FILE = RESULTS / "calibration.jsonl"
TRAIN, HELD_OUT, EPOCHS, TOKENS = 200, 50, 20, 24
DRAWS, BATCH = 10_000, 8
# of the training examples, for the prior that is tuned on what was learned by heart
SEEN, SEEN_SEEDS = 0.2, (0,)
# title in the plot -> arm
PANELS = {
    "MAP": "map",
    "temperature scaling": "temperature",
    "all layers, validation, MC": "all validation mc",
    "all layers, evidence, MC": "all evidence mc",
}


def run(base: Settings, seeds: list[int]) -> None:
    """Every seed that the file does not hold yet."""
    torch.set_num_threads(base.thread_count)
    source, texts = find_model(base), load_texts(base)
    tokenizer = load_tokenizer(source)
    pool = encode(texts.train, texts.train_labels, tokenizer, base)
    judged = encode(texts.evaluation, texts.evaluation_labels, tokenizer, base)
    groups = near_copies(texts.train)
    done = {_key(r) for r in read()}
    for seed in seeds:
        row: dict[str, Any] = {"bench": "calibration", "seed": seed, "epochs": base.epochs, "tokens": base.max_length, "quick": base.quick}
        if _key(row) in done:
            continue
        fitted, held_out, its_groups = _draw(pool, groups, seed)
        model, new = load_model(source, base, classes=texts.classes, pad=tokenizer.pad_token_id, seed=seed)
        [arm] = build_arms([FASTPEFT], model, new, base, seed=seed)
        t = trainee(arm, base)
        train([t], fitted, held_out, base, seed=seed)
        row |= {"train": len(fitted), "held_out": len(held_out), "judged": len(judged), "draws": DRAWS}
        row |= {"train_loss": statistics.fmean(t.losses[-13:]), "trainable": arm.trainable}
        emit(row | _measure(arm.model, fitted, its_groups, held_out, judged, seed), None if base.quick else FILE)


def _draw(pool: Examples, groups: list[int], seed: int) -> tuple[Examples, Examples, list[int]]:
    """TRAIN and HELD_OUT examples, about so many, stratified, near-copies on one side; and the groups of the former."""
    assert pool.labels is not None
    wanted = min(TRAIN + HELD_OUT, len(pool) // 2)
    _, some = split(groups, pool.labels, share=wanted / len(pool), seed=seed)
    own, labels = [groups[k] for k in some], [pool.labels[k] for k in some]
    rest, held = split(own, labels, share=HELD_OUT / (TRAIN + HELD_OUT), seed=seed)
    return pool.part([some[k] for k in rest]), pool.part([some[k] for k in held]), [own[k] for k in rest]


def _measure(
    model: Any, fitted: Examples, groups: list[int], held_out: Examples, judged: Examples, seed: int
) -> dict[str, Any]:
    """Precisions, evidences, mean standard deviation of a logit, temperature, and per arm the scores and the bins."""
    found: dict[str, Any] = {"precision": {}, "log_evidence": {}, "deviation": {}, "arms": {}, "bins": {}}
    assert fitted.labels is not None

    def note(name: str, p: Tensor, y: Tensor) -> None:
        found["arms"][name] = laplace.scores(p, y)
        found["bins"][name] = [torch.nan_to_num(v).tolist() for v in laplace.reliability(p, y)]

    def judge(name: str, posterior: laplace.Posterior, precisions: dict[str, Tensor]) -> None:
        """Of a posterior under several precisions; each batch is looked at once."""
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {prior: [] for prior in precisions}
        for batch in judged.in_order(BATCH):
            f, J = posterior._project(batch)
            for prior, precision in precisions.items():
                parts[prior].append((f, posterior._covariance(J, precision)))
        for prior, own in parts.items():
            found["precision"][f"{name} {prior}"] = precisions[prior].item()
            found["log_evidence"][f"{name} {prior}"] = posterior.log_evidence(precisions[prior]).item()
            variance = torch.cat([S.diagonal(dim1=1, dim2=2) for _, S in own])
            found["deviation"][f"{name} {prior}"] = variance.sqrt().mean().item()
            for kind in ("probit", "mc"):
                generator = torch.Generator().manual_seed(seed)
                p = [laplace.predictive(f, S, kind, samples=DRAWS, generator=generator) for f, S in own]
                note(f"{name} {prior} {kind}", torch.cat(p), truth)

    def tuned_on(posterior: laplace.Posterior, examples: Examples) -> Tensor:
        posterior.precision = torch.ones((), dtype=torch.float64)
        posterior.tune_on(examples.in_order(BATCH), seed=seed)
        return posterior.precision

    for layers in ("last", "all"):
        posterior = laplace.fit(model, fitted.in_order(BATCH), sites=layers)
        if layers == "last":
            p, truth = posterior.evaluate(judged.in_order(BATCH), "map")
            note("map", p, truth)
            found["train_scores"] = laplace.scores(*posterior.evaluate(fitted.in_order(BATCH), "map"))
            found["temperature"] = temperature(*posterior.evaluate(held_out.in_order(BATCH), "map"))
            note("temperature", (p.log() / found["temperature"]).softmax(1), truth)
        posterior.tune()
        evidence = posterior.precision
        judge(layers, posterior, {"evidence": evidence, "validation": tuned_on(posterior, held_out)})
    if seed in SEEN_SEEDS:
        rest, seen = split(groups, fitted.labels, share=SEEN, seed=seed)
        posterior = laplace.fit(model, fitted.part(rest).in_order(BATCH))
        judge("all", posterior, {"seen": tuned_on(posterior, fitted.part(seen))})
    return found


def temperature(p: Tensor, y: Tensor) -> float:
    """The T of the lowest mean -log softmax(log p / T)[y]."""
    from scipy.optimize import minimize_scalar

    log = p.log()

    def loss(t: float) -> float:
        return torch.nn.functional.cross_entropy(log / 10**t, y).item()

    return float(10 ** minimize_scalar(loss, bounds=(-2, 3), method="bounded").x)


def read() -> list[dict[str, Any]]:
    return read_rows(FILE)


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    return row["seed"], row["epochs"], row["tokens"]


def table(rows: list[dict[str, Any]]) -> str:
    """Per arm the mean over the seeds (and the spread of the accuracies), as Markdown."""
    lines = ["| arm | accuracy | per seed | NLL | ECE | Brier | precision |", "| --- | ---: | --- | ---: | ---: | ---: | ---: |"]
    arms = {arm: [r for r in rows if arm in r["arms"]] for row in rows for arm in row["arms"]}
    for arm, rows in arms.items():
        mean = {k: statistics.fmean(r["arms"][arm][k] for r in rows) for k in ("accuracy", "nll", "ece", "brier")}
        each = " ".join(f"{r['arms'][arm]['accuracy']:.3f}" for r in rows)
        precisions = " ".join(f"{r['precision'][arm.rpartition(' ')[0]]:.3g}" for r in rows) if arm.rpartition(" ")[0] else ""
        lines.append(
            f"| {arm} | {mean['accuracy']:.3f} | {each} | {mean['nll']:.3f} | {mean['ece']:.3f} | {mean['brier']:.3f} | {precisions} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Reliability diagrams of all seeds' predictions together."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from fastpeft.job.reliability import draw_panel

    figure, panels = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.8), layout="constrained", sharey=True)
    for axes, (title, arm) in zip(panels, PANELS.items(), strict=True):
        share, right, sure = torch.tensor([r["bins"][arm] for r in rows], dtype=torch.float64).unbind(1)
        total = share.sum(0)
        pooled = laplace.Reliability(total / len(rows), (share * right).sum(0) / total, (share * sure).sum(0) / total)
        axes.spines[["top", "right"]].set_visible(False)
        error = (pooled.share * (pooled.accuracy - pooled.confidence).abs())[total > 0].sum()
        draw_panel(axes, pooled, f"{title}: ECE {error:.3f}")
    panels[0].set_ylabel("accuracy (bars), share of samples (line)")
    panels[0].legend(fontsize=7, loc="upper left")
    figure.suptitle(f"{len(rows)} seeds together")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="two epochs on few examples, nothing is saved: does it run?")
    parser.add_argument("--table", action="store_true", help="table and plot of what the file holds, run nothing")
    args = parser.parse_args()
    settings = Settings(
        method="laplace",
        target_modules=("query", "value"),
        compare=False,
        max_length=TOKENS,
        epochs=2 if args.quick else args.epochs,
        quick=args.quick,
        threads=args.threads,
    )
    if not args.table:
        run(settings, args.seeds)
    rows = [r for r in read() if r["epochs"] == args.epochs]
    if rows and not args.quick:
        print(table(rows))
        plot(rows, FILE.with_suffix(".png"))


if __name__ == "__main__":
    main()
