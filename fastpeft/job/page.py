"""report.md, and the same table for a terminal."""

from __future__ import annotations

import math
import statistics

from fastpeft.job import measure
from fastpeft.job.arms import FASTPEFT, PEFT
from fastpeft.job.history import module_type
from fastpeft.job.outcome import Outcome, comparison, ratio_to, versions

MIB = 1 << 20


def table(outcome: Outcome) -> list[list[str]]:
    """The side-by-side table, header first."""
    peft = outcome.arm(PEFT)
    cuda = outcome.settings.torch_device.startswith("cuda")
    rows = [
        [
            "arm",
            "step time (median)",
            *(["of PEFT's"] if peft else []),
            "saved for backward",
            "peak memory (own process)",
            *(["peak on the device"] if cuda else []),
            "trainable",
            f"{outcome.metric} before",
            f"{outcome.metric} after",
        ]
    ]
    for a in outcome.arms:
        mean, spread = measure.mean_and_spread(a.result)
        ratio = ratio_to(a, peft)
        rows.append(
            [
                a.title,
                f"{1000 * statistics.median(a.step_seconds):.1f} ms",
                *([] if ratio is None else [f"{ratio:.2f}"]),
                f"{a.saved_bytes / MIB:.1f} MiB",
                f"{a.memory['peak'] / MIB:.0f} MiB",
                *([f"{a.memory['cuda_peak'] / MIB:.0f} MiB"] if cuda else []),
                f"{a.trainable:,d}",
                f"{measure.mean_and_spread(a.metric(0))[0]:.3f}",
                f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else ""),
            ]
        )
    return rows


def as_text(outcome: Outcome) -> str:
    """The table with aligned columns, for a terminal."""
    rows = table(outcome)
    widths = [max(len(r[k]) for r in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def as_markdown(outcome: Outcome) -> str:
    """The whole report.md."""
    s = outcome.settings
    header, *body = table(outcome)
    grid = [f"| {' | '.join(r)} |" for r in [header, ["---"] * len(header), *body]]
    parts = [
        f"# {s.method} on {outcome.model['name']}",
        "\n".join(_job(outcome)),
        "\n".join(grid),
        "\n".join(f"- **{a.title}**: {a.note}." for a in outcome.arms),
        "\n".join(_reading(outcome)),
        "![loss](loss.png)\n\n![memory](memory.png)",
        *(_progress(outcome, kind) for kind in outcome.progress_kinds),
        "## What the columns are\n\n" + "\n".join(_columns(outcome)),
        "## Versions\n\n" + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _job(outcome: Outcome) -> list[str]:
    s, data = outcome.settings, outcome.data
    options = ", ".join(f"{k}={v}" for k, v in s.options.items()) or "the method's defaults"
    targets = s.target_modules if isinstance(s.target_modules, str) else ", ".join(s.target_modules)
    lines = [
        f"- Data: {data['description']}; {data['train']} examples to learn from, {data['evaluation']} to "
        "evaluate on.",
        f"- Method: {s.method}, {options}; targets {targets}.",
        f"- Training: {'' if s.patience is None else 'at most '}{s.epochs} epochs, batch {s.batch_size}, at most {s.max_length} tokens, AdamW at "
        f"{s.lr:g}{'' if s.own_lr == s.lr else f' (the adapter in the fastpeft arm at {s.own_lr:g})'} with warm-up, "
        f"seeds {', '.join(map(str, s.seeds))}, {s.dtype}, {s.torch_device}, {s.thread_count} threads; "
        f"{_wall(outcome)}.",
    ]
    if outcome.aside:
        owners = ", ".join(f"{count} are {name}'s alone (D2)" for name, count in outcome.aside.items())
        lines.append(f"- Split: of the {data['train']} examples {outcome.learned_from} train every arm (D1), {owners}, drawn anew for each seed.")
    if outcome.model["sha256"]:
        lines.append(f"- Weights: sha256 `{outcome.model['sha256']}`.")
    return lines


def _wall(outcome: Outcome) -> str:
    """The wall time, and of a resumed run what its sum leaves out."""
    n = len(outcome.sessions)
    if n == 1:
        return f"{outcome.seconds:.0f} s in all"
    each = " + ".join(f"{s:.0f}" for s in outcome.sessions)
    return (
        f"interrupted and resumed: {each} s measured in {n} processes, each up to its last saved state; what was lost and "
        "done again, and the time between them, is not in it"
    )


def _stopping(outcome: Outcome) -> list[str]:
    """One line per run with early stopping: which epochs were kept, of how many that ran."""
    s = outcome.settings
    if s.patience is None:
        return []
    arms = []
    for a in outcome.arms:
        each = ", ".join(f"{e} of {len(x) - 1}" for e, x in zip(a.kept_epochs, a.scores, strict=True))
        arms.append(f"{a.title}: {each}")
    return [
        f"- Early stopping, patience {s.patience}, min_delta {s.min_delta:g}: an arm's epochs are judged by its loss on "
        f"{outcome.data['validation']} validation examples, held out of the training data, and the best epoch's "
        f"weights are kept. The evaluation examples took no part in it. Kept epoch per seed: {'; '.join(arms)}."
    ]


def _reading(outcome: Outcome) -> list[str]:
    """What the table means, in sentences that hold whatever the numbers are."""
    data, n = outcome.data, outcome.data["evaluation"]
    lines = []
    if data["majority_accuracy"] is not None:
        after = measure.mean_and_spread(outcome.arms[-1].result)[0]
        lines.append(
            f"- Always answering the most frequent class scores {data['majority_accuracy']:.3f}. With {n} "
            "evaluation examples "
            f"one standard error of an accuracy of {after:.3f} is {math.sqrt(after * (1 - after) / n):.3f}."
        )
    differences = comparison(outcome)
    if differences is not None:
        mean, spread = measure.mean_and_spread(differences)
        each = ", ".join(f"{d:+.3f}" for d in differences)
        over = f" (standard deviation {spread:.3f}; per seed {each})" if spread is not None else ""
        lines.append(f"- fastpeft minus PEFT in {outcome.metric}: {mean:+.3f}{over}.")
    lines += [_gaps(outcome), *_stopping(outcome), *_routing(outcome)]
    r = outcome.reload
    through = "" if r.peft is None else f", and of {r.peft:.1e} when stock PEFT loads it"
    lines.append(
        f"- The adapter of seed {outcome.settings.seeds[0]} is in `adapter/`. In a fresh model its logits "
        "have a largest "
        f"difference of {r.fastpeft:.1e} from the trained model's{through} (largest logit {r.scale:.2f})."
    )
    return lines


def _routing(outcome: Outcome) -> list[str]:
    """How often the routers choose the domain of an evaluation text, where the method has routers."""
    ours = outcome.arm(FASTPEFT)
    shares = [] if ours is None else [s[e].routed for s, e in zip(ours.scores, ours.kept_epochs, strict=True)]
    found = [share for share in shares if share is not None]
    if not found:
        return []
    mean, spread = measure.mean_and_spread(found)
    domains = outcome.data["domains"]
    return [
        f"- Routers: in {mean:.3f}{'' if spread is None else f' ± {spread:.3f}'} of all (block, evaluation text) the router chooses the text's own domain, one of "
        f"{len(domains)} ({', '.join(domains)}). They are not told it; in training each text uses its domain's expert."
    ]


def _gaps(outcome: Outcome) -> str:
    each = []
    for a in outcome.arms:
        mean, spread = measure.mean_and_spread(outcome.loss_gap(a))
        each.append(f"{a.title} {mean:+.3f}" + ("" if spread is None else f" ± {spread:.3f}"))
    epoch = "last" if outcome.settings.patience is None else "kept"
    return (
        f"- Evaluation loss minus training loss: {', '.join(each)}. The training loss is the mean over the steps of the {epoch} epoch, as "
        "they were taken: with dropout, and with weights that still moved."
    )


_PROGRESS = {
    "ranks": (
        "Ranks in use",
        "Ranks in use after each step, a mean over the layers of a type of module; in the table also their sum. Memory and the number of "
        "trainable parameters above are those at the start.",
    ),
    "freezing": (
        "Matrices that still train",
        "Share of the matrices that train, by type; 1 is all of them, and what is frozen stays so. What trains beside these matrices is not "
        "in it. Memory and the number of trainable parameters above are those at the start.",
    ),
}


def _progress(outcome: Outcome, kind: str) -> str:
    """The plot of what the procedure counts, and a table: before training, and with the weights that were kept."""
    title, text = _PROGRESS[kind]
    ours = outcome.arm(FASTPEFT)
    assert ours is not None
    ends = [min(len(x), e * outcome.steps_per_epoch) for x, e in zip(ours.losses, ours.kept_epochs, strict=True)]
    pairs = [(seed[kind].at(0), seed[kind].at(end)) for seed, end in zip(ours.histories, ends, strict=True)]
    names = list(pairs[0][0])
    rows = ["| type | of | before | in the result, by seed |", "| --- | ---: | ---: | --- |"]
    for group in [*dict.fromkeys(map(module_type, names)), None]:
        own = [n for n in names if group is None or module_type(n) == group]
        before, *after = (sum(counts[n] for n in own) for counts in (pairs[0][0], *(last for _, last in pairs)))
        rows.append(f"| {group or 'all'} | {len(own)} | {before} | {', '.join(map(str, after))} |")
    seeds = f" Thick: seed {outcome.settings.seeds[0]}; thin: the others." if len(ours.histories) > 1 else ""
    return f"## {title}\n\n![{kind}]({kind}.png)\n\n{text}{seeds}\n\n" + "\n".join(rows)


def _columns(outcome: Outcome) -> list[str]:
    rows, tokens = outcome.measured_batch
    lines = [
        "- Step time: forward, backward, clipping and optimiser step of one batch; the arms take turns "
        "within each step, in "
        f"random order, in one process; the first {measure.WARM_UP_STEPS} steps of a seed"
        + (" and after a resume" if len(outcome.sessions) > 1 else "")
        + " are left out.",
        "- Saved for backward: distinct storages that autograd keeps in one training forward of the batch "
        f"of {rows} x {tokens} "
        "tokens that is largest; parameters, buffers and the batch itself are not counted.",
        "- Peak memory: highest resident size of a fresh process that runs a few steps of that arm on that "
        "batch; it contains "
        "the interpreter, the libraries, the model, the adapter, gradients, optimiser state and activations.",
        f"- {outcome.metric.capitalize()} before: with the adapter attached and nothing trained. After: the "
        + ("last epoch" if outcome.settings.patience is None else "epoch that early stopping kept")
        + (", mean ± standard deviation over the seeds." if len(outcome.settings.seeds) > 1 else "."),
    ]
    if outcome.arm(PEFT) is not None:
        lines.insert(
            1, "- \"Of PEFT's\": median over steps of the ratio to the PEFT arm's time in the same step."
        )
    return lines
