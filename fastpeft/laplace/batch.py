"""What a batch means: the class logits, the labels, and which positions are no padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def answers(token_ids: Sequence[int]) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
    """The `logits` of a causal language model on a closed set of answers: those of token_ids at the last position of each sample.

    Batches are mappings with input_ids and, where samples are padded on either side, an attention_mask; their labels are indices
    into token_ids.
    """
    ids = list(token_ids)
    if len(ids) < 2 or len(set(ids)) != len(ids):
        raise ValueError(f"laplace.answers: token_ids={ids}; give two or more different tokens, one for each answer.")

    def logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        every = class_logits(model, batch)
        mask = batch.get("attention_mask")
        if mask is None:
            return every[:, -1, ids]
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask != 0, positions, -1).amax(1)
        return every[torch.arange(len(last), device=last.device), last][:, ids]

    return logits


def class_logits(model: nn.Module, batch: Any) -> Tensor:
    """model(**batch).logits of a mapping without its labels; else model(batch[0]), or its logits."""
    if isinstance(batch, Mapping):
        out = model(**{k: v for k, v in batch.items() if k != "labels"})
    else:
        out = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return out if isinstance(out, Tensor) else out.logits


def class_labels(batch: Any) -> Tensor:
    """batch["labels"] of a mapping, else batch[1]."""
    return batch["labels"] if isinstance(batch, Mapping) else batch[1]


def attended(batch: Any) -> Tensor | None:
    """batch["attention_mask"] [samples, tokens] of a mapping that has one."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


@dataclass(frozen=True)
class Reader:
    """Three functions from batches to tensors; logits also gets the model."""

    logits: Callable[[nn.Module, Any], Tensor] = class_logits
    labels: Callable[[Any], Tensor] = class_labels
    mask: Callable[[Any], Tensor | None] = attended

    def read_logits(self, model: nn.Module, batch: Any) -> Tensor:
        """[samples, classes]; ValueError for anything else."""
        f = self.logits(model, batch)
        if f.dim() != 2 or f.shape[1] < 2:
            raise ValueError(
                f"laplace: the logits are {tuple(f.shape)}; needed are [samples, classes] of two classes or more. For a language model "
                "give logits=laplace.answers(token_ids); for another shape a function of (model, batch)."
            )
        return f

    def read_labels(self, batch: Any, f: Tensor) -> Tensor:
        """[samples], classes; ValueError for anything else."""
        y = self.labels(batch).to(f.device)
        if tuple(y.shape) != f.shape[:1] or y.is_floating_point() or (len(y) and not (0 <= y.min() and y.max() < f.shape[1])):
            raise ValueError(
                f"laplace: the labels are {y.dtype} {tuple(y.shape)}; needed are classes [samples] = ({len(f)},) from 0 to "
                f"{f.shape[1] - 1}. Give labels= a function of the batch."
            )
        return y


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    match batch:
        case Tensor():
            return batch.to(device)
        case Mapping():
            return {k: to_device(v, device) for k, v in batch.items()}
        case tuple() | list():
            return [to_device(v, device) for v in batch]
    return batch
