"""What a user can ask of `fastpeft finetune`, checked before any long work."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from fastpeft.job.errors import JobError, require

CLASSIFICATION = "classification"
CAUSAL_LM = "causal-lm"
TASKS = (CLASSIFICATION, CAUSAL_LM)
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """model: name or folder, None for the carried encoder.   data: source, None for the built-in docstrings.

    options: the method's own; what is missing takes the method's default.   threads: None for every core
    given to us.
    device: None for CUDA where there is one, else the CPU.   quick: one epoch on few examples, to see that
    everything works.
    lr: of everything that trains; adapter_lr: of the adapter's own parameters, None for the method's published rule or,
    where it has none, lr.
    patience: epochs without an improvement of the validation loss by more than min_delta after which an arm stops;
    None trains for all epochs.   validation_share: of the training data, held out for that.
    save_every: steps between two saves of the run's state, beside one at each epoch's end; 0 for those alone.
    procedures: classes of fastpeft.train to attach beside those that the method's recipe names.   procedure_options: of both.
    """

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    task: str = CLASSIFICATION
    text_column: str = "text"
    label_column: str = "label"
    domain_column: str = "domain"
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = "all-linear"
    epochs: int = 3
    batch_size: int = 16
    max_length: int = 48
    lr: float = 2e-3
    adapter_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    clip: float = 1.0
    seeds: tuple[int, ...] = (0,)
    split_seed: int = 0
    eval_share: float = 0.2
    output: str = "fastpeft-finetune"
    threads: int | None = None
    device: str | None = None
    dtype: str = "float32"
    compare: bool = True
    quick: bool = False
    patience: int | None = None
    min_delta: float = 0.0
    validation_share: float = 0.1
    save_every: int = 100
    procedures: tuple[str, ...] = ()
    procedure_options: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> None:
        """check_values, and JobError for an output folder that cannot be written."""
        self.check_values()
        self._check_output()

    def check_values(self) -> None:
        """Raise JobError for a value out of range, a library that is missing, a method that does not exist."""
        for name, value in (("epochs", self.epochs), ("batch-size", self.batch_size)):
            if value < 1:
                raise JobError(f"finetune: --{name} {value}; it must be at least 1.")
        if self.max_length < 4:
            raise JobError(f"finetune: --max-length {self.max_length}; it must be at least 4 tokens.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise JobError(f"finetune: --lr {self.lr}; it must be a finite number above 0.")
        if self.adapter_lr is not None and not (math.isfinite(self.adapter_lr) and self.adapter_lr > 0):
            raise JobError(f"finetune: --adapter-lr {self.adapter_lr}; it must be a finite number above 0.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise JobError(
                f"finetune: --seeds {list(self.seeds)}; give different whole numbers of at least 0."
            )
        if self.threads is not None and self.threads < 1:
            raise JobError(f"finetune: --threads {self.threads}; it must be at least 1.")
        self._check_stopping()
        if self.task == CAUSAL_LM and self.model is None:
            raise JobError(
                "finetune: --task causal-lm needs --model: the carried model is an encoder, which cannot do "
                "it."
            )
        if self.eval_data is not None and self.data is None:
            raise JobError(
                "finetune: --eval-data without --data; the built-in data set brings its own split."
            )
        require("this command", "transformers", "tqdm", "matplotlib")
        if self.compare:
            require("the comparison (--no-compare leaves it out)", "peft")
        self.check_device()
        self._check_method()

    def _check_stopping(self) -> None:
        if self.save_every < 0:
            raise JobError(
                f"finetune: --save-every {self.save_every}; it must be a number of steps, or 0 to save at epoch ends only."
            )
        if self.patience is not None and self.patience < 1:
            raise JobError(f"finetune: --patience {self.patience}; it must be at least 1 epoch.")
        if not (math.isfinite(self.min_delta) and self.min_delta >= 0):
            raise JobError(f"finetune: --min-delta {self.min_delta}; it must be a finite loss of at least 0.")
        if self.min_delta and self.patience is None:
            raise JobError(
                f"finetune: --min-delta {self.min_delta} without --patience; give both, or neither."
            )

    def check_device(self) -> None:
        import torch

        try:
            torch.empty(1, device=self.device or "cpu")
        except (RuntimeError, AssertionError) as e:
            # AssertionError: what torch raises for "cuda" in a build without CUDA
            raise JobError(f"finetune: --device {self.device}: {str(e).splitlines()[0]}") from None

    def _check_method(self) -> None:
        from fastpeft.job.procedures import build_procedures
        from fastpeft.registry import check_options, get_recipe

        try:
            get_recipe(self.method)
            check_options([self.method], self.options)
        except ValueError as e:
            raise JobError(str(e)) from None
        own = get_recipe(self.method).cls.PROCEDURE
        build_procedures([*([own] if own else []), *self.procedures], self.procedure_options)

    def _check_output(self) -> None:
        folder = Path(self.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as e:
            raise JobError(
                f"finetune: --output {self.output}: cannot write there ({e.strerror or e})."
            ) from None

    @property
    def routed(self) -> bool:
        """Whether the method's routers learn the domains of the texts."""
        from fastpeft.registry import get_recipe

        return get_recipe(self.method).cls.ROUTED

    @property
    def own_lr(self) -> float:
        """The learning rate of the adapter's own parameters."""
        from fastpeft.registry import get_recipe

        if self.adapter_lr is not None:
            return self.adapter_lr
        recipe = get_recipe(self.method)
        rule = recipe.cls.learning_rate(recipe.options | dict(self.options))
        return self.lr if rule is None else rule

    @property
    def thread_count(self) -> int:
        """--threads, or the number of cores that this process may use."""
        if self.threads is not None:
            return self.threads
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    @property
    def torch_device(self) -> str:
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")
