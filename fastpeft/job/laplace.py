"""`fastpeft laplace`: a posterior over a saved adapter, and how well its predictions are calibrated."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft import laplace as library
from fastpeft.job.calibrate import EVIDENCE, VALIDATION, VALIDATION_SHARE, Calibration
from fastpeft.job.data import Examples
from fastpeft.job.errors import JobError
from fastpeft.job.outcome import versions
from fastpeft.job.reliability import draw_reliability
from fastpeft.job.report import _atomic
from fastpeft.job.trained import Trained, load_trained, open_folder
from fastpeft.laplace import Posterior
from fastpeft.laplace.observe import find_layers

KINDS = ("map", "probit", "mc")


@dataclass(frozen=True)
class Calibrated:
    """What laplace.json says. notes: what a reader of the figures should know.   log_evidence: of the fitted examples.

    examples: how many were fitted, tuned on (0: the evidence or a number) and judged.   validation_nll: where it was tuned on some.
    scores: per kind accuracy, nll, brier, ece.   bins: per kind, of library.Reliability.
    """

    asked: Calibration
    model: str
    description: str
    classes: list[str]
    notes: list[str]
    examples: dict[str, int]
    layers: list[str]
    precision: float
    log_evidence: float
    validation_nll: float | None
    scores: dict[str, dict[str, float]]
    bins: dict[str, library.Reliability]

    def as_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite, such as the accuracy of an empty bin, is None."""
        same = ("model", "classes", "notes", "examples", "layers", "precision", "log_evidence", "validation_nll")
        bins = {kind: {name: _finite(v.tolist()) for name, v in r._asdict().items()} for kind, r in self.bins.items()}
        return {"settings": self.asked.as_dict(), "data": self.description} | {name: getattr(self, name) for name in same} | {
            "kinds": {k: {name: _finite(v) for name, v in s.items()} for k, s in self.scores.items()},
            "reliability": bins,
            "versions": versions(),
        }  # fmt: skip


def calibrate(asked: Calibration, *, say: Any = print) -> Calibrated:
    """Fit, tune, predict the evaluation examples, and write laplace.safetensors, reliability.png and laplace.json.

    say: takes lines for the user.   Raises JobError with a message for the user, for bad input before anything is fitted.
    """
    asked.check()
    folder = open_folder(asked)
    asked.check_output()
    torch.set_num_threads(folder.settings.thread_count)
    trained = load_trained(folder, asked.classes)
    try:
        find_layers(trained.model, "all")
    except ValueError as e:
        raise JobError(f"laplace: {folder.adapter}: {e}") from None
    fitted, tuned, notes = _parts(asked, trained)
    say(f"model: {trained.source}\ndata: {trained.texts.description}")
    say(f"fit: {len(fitted)} examples; judged on {len(trained.held)}")
    for note in notes:
        say(f"note: {note}")
    try:
        posterior = library.fit(
            trained.model, _batches(fitted, asked, "fit"), sites=asked.layers, n_kfac=asked.n_kfac, large=asked.large
        )
        nll = tune(posterior, asked, None if tuned is None else _batches(tuned, asked, "held-out"))
        say(f"prior precision {float(posterior.precision):.4g}, log evidence {posterior.log_evidence().item():.1f}")
        probabilities, labels = predict(posterior, _batches(trained.held, asked, "predict"), asked)
    except (RuntimeError, ValueError) as e:
        # a layer that never runs, a factorisation of what is not finite, too little memory
        why = str(e).splitlines()[0]
        hint = " A smaller --large or --batch-size needs less." if "memory" in why else ""
        raise JobError(f"laplace: {why.rstrip('.')}. Nothing was written.{hint}", code=1) from None
    found = Calibrated(
        asked,
        trained.source,
        trained.texts.description,
        trained.texts.classes or [],
        notes,
        {"fitted": len(fitted), "tuned_on": 0 if tuned is None else len(tuned), "judged": len(trained.held)},
        list(posterior.layers),
        float(posterior.precision),
        posterior.log_evidence().item(),
        nll,
        {kind: library.scores(p, labels, asked.bins) for kind, p in probabilities.items()},
        {kind: library.reliability(p, labels, asked.bins) for kind, p in probabilities.items()},
    )
    _write(found, posterior)
    return found


def _batches(examples: Examples, asked: Calibration, what: str) -> Iterable[dict[str, Tensor]]:
    """In order, with a bar on a terminal."""
    from tqdm import tqdm

    size = asked.batch_size
    return tqdm(examples.in_order(size), total=-(-len(examples) // size), desc=what, unit="batch", disable=not sys.stderr.isatty())


def _parts(asked: Calibration, trained: Trained) -> tuple[Examples, Examples | None, list[str]]:
    """Examples to fit, those to tune the prior on (None for another prior), and notes."""
    if asked.prior != VALIDATION:
        return trained.data, None, []
    if trained.unseen is not None:
        return trained.data, trained.unseen, [
            f"the prior is tuned on the {len(trained.unseen)} examples that early stopping held out of the training"
        ]  # fmt: skip
    fitted, tuned = trained.divide(VALIDATION_SHARE, asked.seed)
    return fitted, tuned, [
        f"the prior is tuned on {len(tuned)} examples that are held out of the fit, but the adapter was trained on them: the precision "
        "comes out too high. `fastpeft finetune --patience` keeps examples that it was not trained on."
    ]  # fmt: skip


def tune(posterior: Posterior, asked: Calibration, held_out: Iterable[Any] | None) -> float | None:
    """Set the prior precision as asked; returns the mean -log p of held_out where it was tuned on that."""
    if held_out is not None:
        return posterior.tune_on(held_out, seed=asked.seed)
    if asked.prior == EVIDENCE:
        posterior.tune()
    else:
        posterior.precision = torch.as_tensor(asked.prior, dtype=torch.float64)
    return None


def predict(posterior: Posterior, loader: Iterable[Any], asked: Calibration) -> tuple[dict[str, Tensor], Tensor]:
    """Per kind the probabilities [samples, classes] of all of loader's samples, from one look at each, and their labels."""
    generator: torch.Generator | None = None
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    labels = []
    for batch in loader:
        f, S = posterior.logits(batch)
        if generator is None:
            # where the logits are: the precision, a number, may lie elsewhere
            generator = torch.Generator(f.device).manual_seed(asked.seed)
        for kind, parts in found.items():
            parts.append(library.predictive(f, S, kind, samples=asked.samples, generator=generator))
        labels.append(posterior.read.read_labels(batch, f))
    return {kind: torch.cat(parts) for kind, parts in found.items()}, torch.cat(labels)


def _write(found: Calibrated, posterior: Posterior) -> None:
    """Each file is complete or absent; laplace.json, which speaks of the others, is the last."""
    folder = found.asked.target
    body = json.dumps(found.as_dict(), indent=2, allow_nan=False) + "\n"
    beside = found.asked.output is None and (folder / "adapter").is_dir()
    try:
        posterior.save(folder / "adapter" if beside else folder)
        _atomic(folder / "reliability.png", lambda path: draw_reliability(found.bins, found.scores, path))
        _atomic(folder / "laplace.json", lambda path: path.write_text(body, encoding="utf-8"))
    except OSError as e:
        raise JobError(f"laplace: cannot write into {folder} ({e.strerror or e}); give another --output.", code=1) from None


def as_table(found: Calibrated) -> str:
    """The scores, a row per kind."""
    rows = [f"{'':8}{'accuracy':>10}{'NLL':>10}{'ECE':>10}{'Brier':>10}"]
    rows += [f"{k:8}" + "".join(f"{s[name]:10.4f}" for name in ("accuracy", "nll", "ece", "brier")) for k, s in found.scores.items()]
    return "\n".join(rows)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value if value - value == 0 else None
