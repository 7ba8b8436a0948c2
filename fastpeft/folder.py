"""A folder of adapter_config.json + adapter_model.safetensors: written whole or not at all, read with every check.

Both files are written beside the old ones and synced, then the weights are renamed, then the config. The weights carry their
config in the header, so an interruption between the two renames is seen and completed by the reader.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIBRARY = "fastpeft"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not belong to the model. The model is as it was."""


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Both files, or neither; meta: fastpeft's own notes. OSError leaves the folder with the checkpoint it held before."""
    from safetensors.torch import save

    text = json.dumps(config, indent=2) + "\n"
    header = {"format": "pt", LIBRARY: json.dumps(dict(meta)), "adapter_config": text}
    data = save({k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}, header)
    folder.mkdir(parents=True, exist_ok=True)
    _finish_interrupted(folder)
    pending = {WEIGHTS: pending_path(folder, WEIGHTS), CONFIG: pending_path(folder, CONFIG)}
    try:
        sync_write(pending[CONFIG], text.encode())
        sync_write(pending[WEIGHTS], data)
    except BaseException:
        for path in pending.values():
            path.unlink(missing_ok=True)
        raise
    for name in (WEIGHTS, CONFIG):  # the weights' rename is the moment at which the new checkpoint exists
        os.replace(pending[name], folder / name)
    _sync_names(folder)


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` the file's content, in a folder that is made if there is none. Whatever stops it leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = pending_path(path.parent, path.name)
    try:
        sync_write(pending, data)
        os.replace(pending, path)
    except BaseException:
        pending.unlink(missing_ok=True)
        raise
    _sync_names(path.parent)


def _sync_names(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finish_interrupted(folder: Path) -> None:
    """Complete a save that stopped between its two renames; its pending config is the only copy beside the header."""
    pending, weights = pending_path(folder, CONFIG), folder / WEIGHTS
    if pending.is_file() and weights.is_file():
        try:
            header, _ = open_weights(weights)
        except CheckpointError:
            return
        if header.get("adapter_config") == pending.read_text(errors="replace"):
            os.replace(pending, folder / CONFIG)


def pending_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.pending"


def sync_write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Config, tensors, and fastpeft's own notes ({} in a file that PEFT wrote)."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    if not weights.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        if pickles:
            raise CheckpointError(
                f"load_adapter: {folder} holds {pickles[0]} (pickle), which is never read; convert it once with PEFT: "
                f"PeftModel.from_pretrained(model, {str(folder)!r}).save_pretrained(new_folder)."
            )
        raise FileNotFoundError(f"load_adapter: {weights} does not exist; give the folder that holds {CONFIG} and {WEIGHTS}.")
    header, tensors = open_weights(weights)
    try:
        meta = json.loads(header.get(LIBRARY, "{}"))
        if not isinstance(meta, dict) or not isinstance(meta.get("options", {}), dict):
            raise ValueError("it is no object with options")
    except ValueError as e:
        raise CheckpointError(f"load_adapter: the {LIBRARY!r} entry in the header of {weights} is damaged: {e}") from e
    return _read_config(folder, config, header.get("adapter_config")), tensors, meta


def open_weights(weights: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file; CheckpointError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"load_adapter: {weights} is no readable safetensors file (truncated or damaged): {e}") from e


def _read_config(folder: Path, path: Path, embedded: str | None) -> dict[str, Any]:
    # undecodable bytes become characters that no config has, and fail as JSON below
    text = path.read_text(errors="replace") if path.is_file() else None
    pending = pending_path(folder, CONFIG)
    if embedded is not None and text != embedded and pending.is_file() and pending.read_text(errors="replace") == embedded:
        text = embedded  # a save was interrupted between its two renames: the new weights are in place, so is their config
    if text is None:
        raise FileNotFoundError(f"load_adapter: {path} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}.")
    try:
        config = json.loads(text)
        if "\ufffd" in text:
            raise ValueError("it holds bytes that are not UTF-8")
    except ValueError as e:
        raise CheckpointError(f"load_adapter: {path} is no JSON: {e}") from e
    if not isinstance(config, dict) or "peft_type" not in config:
        raise CheckpointError(f"load_adapter: {path} has no peft_type; it must be an object as PEFT or fastpeft writes it.")
    if embedded is not None and config != json.loads(embedded):
        was = json.loads(embedded)
        changed = {k: (was.get(k), config.get(k)) for k in {*was, *config} if was.get(k) != config.get(k)}
        raise CheckpointError(
            f"load_adapter: {path} is not the config that {WEIGHTS} was saved with; differing (saved, now): {changed}. "
            "Restore those values; the saved config is in the weights' header under 'adapter_config'."
        )
    return config
