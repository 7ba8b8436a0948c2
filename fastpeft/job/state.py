"""What one job holds from its start to its report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpeft.job.data import Examples, Texts
from fastpeft.job.models import Source, load_model
from fastpeft.job.outcome import ArmResult, Reload
from fastpeft.job.resume import Run
from fastpeft.job.settings import Settings


@dataclass
class Job:
    """Everything that is loaded once for all seeds, and what has been saved so far.

    adapter: a sentence on the adapter that is saved, if one is."""

    settings: Settings
    source: Source
    texts: Texts
    tokenizer: Any
    data: Examples
    held: Examples
    validation: Examples | None
    run: Run
    adapter: str | None = None
    results: dict[str, ArmResult] = field(default_factory=dict)
    reload: Reload | None = None

    @property
    def saved(self) -> str:
        """What a stop leaves behind, for the user."""
        if self.run.position is None:
            return "nothing was changed" if self.run.saved is not None else "nothing was saved"
        return f"{self.adapter or 'no adapter was saved'}; --resume continues {self.run.position}"

    @property
    def classes(self) -> list[str] | None:
        return self.texts.classes

    @property
    def adapter_folder(self) -> Path:
        return Path(self.settings.output) / "adapter"

    def load(self, seed: int) -> tuple[Any, list[str]]:
        return load_model(
            self.source, self.settings, classes=self.classes, pad=self.tokenizer.pad_token_id, seed=seed
        )

    def longest_batch(self) -> dict[str, Tensor]:
        """The training examples with the most tokens, one batch of them: the step that needs the most
        memory."""
        order = sorted(range(len(self.data)), key=lambda k: -len(self.data.ids[k]))
        return self.data.batch(order[: self.settings.batch_size])
