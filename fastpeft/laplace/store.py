"""A posterior as laplace.safetensors, beside the adapter folder's own two files: eigenvalues, eigenvectors, modes, precision."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.folder import LIBRARY, CheckpointError, open_weights, replace_file
from fastpeft.laplace.batch import Reader, attended, class_labels, class_logits
from fastpeft.laplace.kronecker import Eigen, Factor
from fastpeft.laplace.observe import factor_name, find_layers
from fastpeft.laplace.posterior import Posterior

FILE = "laplace.safetensors"


def save(posterior: Posterior, folder: str | os.PathLike[str]) -> None:
    """Posterior.save: the whole file or none; OSError leaves what was there."""
    from safetensors.torch import save as written

    tensors = {"precision": posterior.precision}
    for name, factor in posterior.factors.items():
        tensors |= {f"{name}.mode": factor.mode}
        for side in ("G", "U"):
            own: Eigen = getattr(factor, side)
            tensors |= {f"{name}.{side}.values": own.values, f"{name}.{side}.vectors": own.vectors}
    meta = {"factors": list(posterior.factors), "log_likelihood": posterior.log_likelihood, "settings": posterior.settings}
    data = written({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, {LIBRARY: json.dumps(meta)})
    replace_file(Path(folder) / FILE, data)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    logits: Callable[[nn.Module, Any], Tensor] = class_logits,
    labels: Callable[[Any], Tensor] = class_labels,
    mask: Callable[[Any], Tensor | None] = attended,
) -> Posterior:
    """The posterior that Posterior.save wrote, for a model whose adapter has the values that it was fitted to.

    logits, labels, mask: as laplace.fit takes them; they are not saved. FileNotFoundError, or CheckpointError for a file that is
    damaged or belongs to other values.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"laplace.load: {path} does not exist; Posterior.save writes it beside an adapter.")
    header, tensors = open_weights(path)
    try:
        meta = json.loads(header[LIBRARY])
        names, settings = list(meta["factors"]), dict(meta["settings"])
        exactly = "|".join(re.escape(site) for site in settings["sites"])
        layers = find_layers(model, f"(?:{exactly})", names)
        own = {factor_name(site, leaf): getattr(layer, leaf) for site, layer in layers.items() for leaf in layer.random}
        if list(own) != names:
            raise ValueError(f"it is about {names[:8]}, and of these the model has {list(own)[:8]}")
        factors = {name: _factor(name, tensors, own[name]) for name in names}
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError("it holds numbers that are not finite")
        posterior = Posterior(
            model, Reader(logits, labels, mask), layers, factors, tensors["precision"], float(meta["log_likelihood"]), settings
        )
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"laplace.load: {path} does not fit this model: {e}") from e
    return posterior


def _factor(name: str, tensors: dict[str, Tensor], live: Tensor) -> Factor:
    """ValueError where the file's sizes or mode are not the live factor's."""
    mode = tensors[f"{name}.mode"]
    if mode.dtype != live.dtype or not torch.equal(mode, live.detach().cpu()):
        raise ValueError(f"{name} has other values than this posterior was fitted to; load that adapter first")
    sides = []
    for side, size in zip("GU", mode.shape, strict=True):
        values, vectors = tensors[f"{name}.{side}.values"], tensors[f"{name}.{side}.vectors"]
        if values.dtype is not torch.float64 or tuple(vectors.shape) != (size, len(values)):
            raise ValueError(f"{name}.{side} is {values.dtype} {tuple(vectors.shape)} for a side of {size}")
        sides.append(Eigen(values.to(live.device), vectors.to(live.device)))
    return Factor(mode.to(live.device), *sides)
