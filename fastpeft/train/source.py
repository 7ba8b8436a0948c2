"""Batches that a procedure asks for itself, beside those of the loop, and passes over them.

A source gives the k-th batch, k = 0, 1, ...: a function of k, or a sequence that is gone round in turn. A resumed run asks for the
same ones again, which an iterator could not give. A batch is what the model is called with: a mapping (keywords), a tuple or
list (positions), or one tensor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.option_checks import check_finite, check_int
from fastpeft.train.protocol import Batch

Source = Callable[[int], Any] | Sequence[Any]
Loss = Callable[[Any, Any], Tensor]  # (output, batch) -> loss


def divide(count: int, share: float = 0.8, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices of two parts of `count` examples that have none in common: round(share * count) of them, and the others. Both sorted.

    ValueError where one part would be empty.
    """
    check_int("divide", "count", count, 2, None, "examples")
    first = round(check_finite("divide", "share", share) * count)
    if not 0 < first < count:
        raise ValueError(f"divide: share={share} of {count} examples is {first}; both parts need at least one.")
    order = random.Random(f"divide {seed}").sample(range(count), count)
    return sorted(order[:first]), sorted(order[first:])


class Batches:
    """A source over a data set: batch k is a function of (seed, k), and every example comes once per epoch.

    examples: anything with len() and indices.   size: examples in a batch; the last one of an epoch may have fewer.
    collate: a list of examples -> a batch; None: torch's default.
    """

    def __init__(self, examples: Any, size: int, *, seed: int = 0, collate: Callable[[list[Any]], Any] | None = None):
        self.size = check_int("Batches", "size", size, 1, None, "size")
        if not len(examples):
            raise ValueError("Batches: there are no examples.")
        self.examples, self.seed = examples, seed
        self._epoch, self._order = -1, list[int]()
        self.collate = torch.utils.data.default_collate if collate is None else collate

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.examples) // self.size)

    def __call__(self, k: int) -> Any:
        epoch, place = divmod(k, len(self))
        if epoch != self._epoch:
            count = len(self.examples)
            self._epoch, self._order = epoch, random.Random(f"{self.seed} {epoch}").sample(range(count), count)
        return self.collate([self.examples[i] for i in self._order[place * self.size : (place + 1) * self.size]])


def check_source(who: str, source: Any) -> Any:
    """Raise TypeError unless it is a function or a sequence of batches, or None for one that is to come; ValueError if it is empty."""
    if source is not None and not callable(source) and (isinstance(source, str) or not isinstance(source, Sequence)):
        raise TypeError(
            f"{who}: source is {type(source).__name__}; it must be a function of k or a sequence that gives the k-th batch, such as "
            "fastpeft.train.Batches(examples, size). An iterator or a DataLoader cannot be taken up again by a resumed run."
        )
    if isinstance(source, Sequence) and not len(source):
        raise ValueError(f"{who}: source is empty.")
    return source


def need_source(who: str, source: Any, what: str) -> None:
    if source is None:
        raise RuntimeError(
            f"{who}: there is no data for {what}; give source=, a function of k or a sequence of batches that the loop does not train on "
            "(fastpeft.train.divide, fastpeft.train.Batches)."
        )


def batch_of(source: Source, k: int, model: nn.Module) -> Batch:
    """The k-th batch, on the model's device."""
    found = source(k) if callable(source) else source[k % len(source)]
    device = next(model.parameters()).device
    if isinstance(found, Mapping):
        return Batch((), {n: _to(v, device) for n, v in found.items()})
    return Batch(tuple(_to(v, device) for v in (found if isinstance(found, (tuple, list)) else (found,))), {})


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def loss_of(model: nn.Module, batch: Batch, loss: Loss | None, who: str) -> Tensor:
    """The loss of one pass: the `loss` of the model's output, or loss(output, batch as the source gave it)."""
    output = model(*batch.args, **batch.kwargs)
    if loss is not None:
        given: Any = batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)
        return loss(output, given)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise RuntimeError(
            f"{who}: the model's output ({type(output).__name__}) has no `loss` tensor; give loss=, a function of (output, batch), or "
            "return the loss as `loss`."
        )
    return found


def mean_over_ranks(t: Tensor) -> Tensor:
    """The mean over the processes of a data-parallel run, in place; itself without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(t)
        t /= torch.distributed.get_world_size()
    return t
