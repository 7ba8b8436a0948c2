"""What training changes in a model: the parameters that train, and the buffers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastpeft.job.errors import JobError
from fastpeft.record import RECORD
from fastpeft.registry import Method


def live_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> the model's own tensor."""
    record = model.__dict__.get(RECORD)
    own = set() if record is None else set(record.trained)  # which train without a gradient of their own, or only at times
    # an adapter's own that are frozen now may have trained before (AFLoRA)
    adapters = {p for m in model.modules() if isinstance(m, Method) for p in m.parameters()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad or n in own or p in adapters}
    return trained | dict(model.named_buffers())


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: t.detach().to("cpu", copy=True) for name, t in live_weights(model).items()}


@torch.no_grad()
def set_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy `saved` into the model. Raises JobError, before anything is set, if names, shapes or dtypes differ."""
    live = live_weights(model)
    wrong = sorted(live.keys() ^ saved.keys())
    wrong += [n for n in live.keys() & saved.keys() if _kind(live[n]) != _kind(saved[n])]
    if wrong:
        raise JobError(
            f"finetune: the saved state does not fit {type(model).__name__}: {', '.join(wrong[:4])}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}. Resume with the version of fastpeft that saved it."
        )
    for name, tensor in live.items():
        tensor.copy_(saved[name])
    for module in model.modules():
        if isinstance(module, Method):
            module.restored()


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype]:
    return t.shape, t.dtype
