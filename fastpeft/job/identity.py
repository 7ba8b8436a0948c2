"""What makes two runs the same run: settings, libraries, data and model. A resume compares it with what was
saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastpeft.job.data import Examples
from fastpeft.job.outcome import versions
from fastpeft.job.settings import Settings

# where results go and how often they are saved does not change them
_FREE = ("output", "save_every")
_LIBRARIES = ("fastpeft", "torch", "transformers", "peft")


def of_settings(settings: Settings) -> dict[str, Any]:
    """Every setting that can change a figure, with threads and device as resolved, and library versions; plain
    JSON."""
    found = {k: v for k, v in settings.as_dict().items() if k not in _FREE}
    found |= {"threads": settings.thread_count, "device": settings.torch_device}
    found |= {f"{name} (version)": v for name, v in versions().items() if name in _LIBRARIES}
    return json.loads(json.dumps(found, default=str))


def of_examples(parts: dict[str, Examples | None], classes: list[str] | None) -> dict[str, Any]:
    """A digest per part of the data, of its token ids, labels and domains, and the class names."""
    return {f"{name} examples": _digest(part) for name, part in parts.items()} | {"classes": classes}


def of_model(model: nn.Module, new: Iterable[str]) -> dict[str, Any]:
    """A digest of all parameters and buffers but those of the modules `new`, which depend on a seed."""
    own = tuple(f"{name}." for name in new)
    h = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(own):
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {"the model's weights": h.hexdigest()}


def _digest(part: Examples | None) -> str | None:
    if part is None:
        return None
    h = hashlib.sha256()
    for k, ids in enumerate(part.ids):
        domain = "" if part.domains is None else f" {part.domains[k]}"
        h.update(f"{ids} {part.labels[k] if part.labels is not None else None}{domain}\n".encode())
    return h.hexdigest()


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One phrase for each entry of `now` that was not the same when the run was saved."""
    return [
        f"{name} was {_short(saved.get(name))} and is {_short(value)} now"
        for name, value in now.items()
        if name not in saved or saved[name] != value
    ]


def _short(value: Any) -> str:
    text = repr(value)
    is_digest = isinstance(value, str) and len(value) == 64 and " " not in value
    return f"sha256 {value[:8]}..." if is_digest else text
