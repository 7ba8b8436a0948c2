"""RoSA's masks as a file: what one run hands to the next, which starts again from the base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.folder import CheckpointError, open_weights, replace_file
from fastpeft.method.rosa import RoSA
from fastpeft.train.rosa import sparse_layers

_KIND = "rosa masks"


def save_masks(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write the index of every rosa layer (safetensors, int32 [2, nnz] under the layer's name); whole or not at all.

    ValueError if there is no rosa layer or one has no mask. Under data parallelism all ranks have the same; let one write.
    """
    layers = _layers(model, "save_masks")
    without = [n for n, m in layers.items() if not m.masked]
    if without:
        raise ValueError(f"save_masks: {', '.join(without[:4])} of {len(layers)} layers have no mask yet; run RoSASchedule to its end.")
    from safetensors.torch import save

    masks = {_key(n): m.index.cpu().contiguous() for n, m in layers.items()}
    replace_file(Path(file), save(masks, {"format": "pt", "fastpeft": _KIND}))


def load_masks(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Give the rosa layers of a freshly adapted model the masks of an earlier run: both parts train from the first step.

    Everything is checked before any layer is changed. FileNotFoundError; CheckpointError for a damaged file, or one of other
    layers, other sizes or another density; ValueError for values that are not zero, which belong to another mask.
    """
    layers = _layers(model, "load_masks")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"load_masks: {path} does not exist; give the file that save_masks wrote.")
    header, masks = open_weights(path)
    if header.get("fastpeft") != _KIND:
        raise CheckpointError(f"load_masks: {path} holds no masks; give a file that fastpeft.train.save_masks wrote.")
    wanted = {_key(n): m for n, m in layers.items()}
    if set(wanted) != set(masks):
        missing, other = sorted(set(wanted) - set(masks)), sorted(set(masks) - set(wanted))
        raise CheckpointError(
            f"load_masks: {path} is of other layers than the model; missing in the file: {missing[:4]}, not in the model: {other[:4]}."
        )
    for key, m in wanted.items():
        _check(key, m, masks[key], path)
    for key, m in wanted.items():
        m.set_mask(masks[key])


def _check(key: str, m: RoSA, mask: Tensor, path: Path) -> None:
    index: Any = m.index
    if mask.dtype != index.dtype or mask.shape != index.shape:
        raise CheckpointError(
            f"load_masks: {key} in {path} is {mask.dtype} {tuple(mask.shape)}, needed {index.dtype} {tuple(index.shape)}; adapt with "
            "the density that the masks were made with."
        )
    try:
        m.check_state({"index": mask})
    except ValueError as e:
        raise CheckpointError(f"load_masks: {key} in {path}: {e}") from e
    if not bool((mask >= 0).all()):
        raise CheckpointError(f"load_masks: {key} in {path} is no mask: it has negative entries.")
    if bool(torch.any(m.values != 0)):
        raise ValueError(f"load_masks: the values of {key} are not zero, so they belong to another mask; adapt the base model anew.")


def _key(site: str) -> str:
    return f"{site}.index" if site else "index"


def _layers(model: nn.Module, who: str) -> dict[str, RoSA]:
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{who}: this {type(model).__name__} has no rosa layer with a sparse part; adapt it with 'rosa'.")
    return layers
