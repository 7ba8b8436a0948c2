"""What a user can ask of `fastpeft laplace`, checked before any long work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from fastpeft.job.errors import JobError, require
from fastpeft.job.settings import Settings

EVIDENCE, VALIDATION = "evidence", "validation"
LAYERS = ("all", "last")
# of the training data, held out of the fit for the prior precision
VALIDATION_SHARE = 0.2
# what the report of a finetune run says, and what a lone adapter folder does not
OF_THE_RUN = ("model", "data", "eval_data", "text_column", "label_column", "classes", "max_length", "split_seed", "dtype")


@dataclass(frozen=True)
class Calibration:
    """folder: of a finetune report, or of an adapter.   output: where the results go, None for that folder.

    prior: EVIDENCE, VALIDATION, or the prior precision itself.   layers: "all", or "last": the adapted layer that runs last.
    n_kfac: eigenvalues kept of a factor's side larger than `large`, None for all of them.   samples: draws of the logits for "mc".
    seed: of the held-out share and the draws.   batch_size: samples whose Jacobians are formed at once.
    model ... dtype: OF_THE_RUN, as finetune takes them; None where the folder's report says it. classes: the labels in the order of
    the model's outputs, None for finetune's own, sorted.
    """

    folder: str
    output: str | None = None
    prior: str | float = EVIDENCE
    layers: str = "all"
    n_kfac: int | None = 10
    large: int = 512
    samples: int = 100_000
    bins: int = 15
    seed: int = 0
    batch_size: int = 8
    threads: int | None = None
    device: str | None = None
    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    classes: tuple[str, ...] | None = None
    max_length: int | None = None
    split_seed: int | None = None
    dtype: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def target(self) -> Path:
        return Path(self.output if self.output is not None else self.folder)

    def check(self) -> None:
        """Raise JobError for a value out of range, a folder that is not there or cannot be written."""
        for name, low in (("samples", 1), ("bins", 1), ("batch_size", 1), ("seed", 0), ("large", 0)):
            self._at_least(name, getattr(self, name), low)
        for name in ("n_kfac", "threads"):
            if getattr(self, name) is not None:
                self._at_least(name, getattr(self, name), 1)
        if self.max_length is not None:
            self._at_least("max_length", self.max_length, 4)  # as finetune
        if self.layers not in LAYERS:
            raise JobError(f"laplace: --layers {self.layers}; it must be one of {', '.join(LAYERS)}.")
        if isinstance(self.prior, str):
            if self.prior not in (EVIDENCE, VALIDATION):
                raise JobError(f"laplace: --prior {self.prior}; it must be {EVIDENCE}, {VALIDATION} or a number above 0.")
        elif not (math.isfinite(self.prior) and self.prior > 0):
            raise JobError(f"laplace: --prior {self.prior}; a prior precision is a finite number above 0.")
        if not Path(self.folder).is_dir():
            raise JobError(f"laplace: {self.folder}: no such folder; give a report folder of `fastpeft finetune`, or an adapter folder.")
        require("this command", "transformers", "matplotlib", "tqdm")
        Settings(device=self.device).check_device()

    def check_output(self) -> None:
        """Raise JobError for an output folder that cannot be written; it is made if absent."""
        try:
            self.target.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.target):
                pass
        except OSError as e:
            raise JobError(f"laplace: cannot write into {self.target} ({e.strerror or e}); give another --output.") from None

    def _at_least(self, name: str, value: int, low: int) -> None:
        if value < low:
            raise JobError(f"laplace: --{name.replace('_', '-')} {value}; it must be at least {low}.")
