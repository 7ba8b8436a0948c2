"""A folder of adapter_config.json + adapter_model.safetensors: written whole or not at all, read with every check.

Both files are written beside the old ones and synced, then the weights are renamed, then the config. The weights carry their
config in the header, so an interruption between the two renames is seen and completed by the reader.

Gates that belong to the weights, and that other libraries do not know, stand in adapter_gates.safetensors, renamed last. Their
header holds a digest of the weights' tensors: gates of other weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# before every key, as PEFT has it
PREFIX = "base_model.model."
CONFIG, WEIGHTS, GATES = "adapter_config.json", "adapter_model.safetensors", "adapter_gates.safetensors"
LIBRARY = "fastpeft"
_DIGEST = "weights_sha256"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not belong to the model. The model is as it was."""


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    meta: Mapping[str, Any],
    gates: Mapping[str, Tensor] | None = None,
) -> None:
    """All files, or none; meta: fastpeft's own notes. OSError leaves the folder with the checkpoint it held before."""
    from safetensors.torch import save

    text = json.dumps(config, indent=2) + "\n"
    header = {"format": "pt", LIBRARY: json.dumps(dict(meta)), "adapter_config": text}
    plain, own = ({k: t.detach().cpu().clone().contiguous() for k, t in ts.items()} for ts in (tensors, gates or {}))
    data = {CONFIG: text.encode()}
    if own:
        data[GATES] = save(own, {"format": "pt", _DIGEST: digest(plain)})
    data[WEIGHTS] = save(plain, header)
    folder.mkdir(parents=True, exist_ok=True)
    _finish_interrupted(folder)
    pending = {name: pending_path(folder, name) for name in data}
    try:
        for name, content in data.items():
            sync_write(pending[name], content)
    except BaseException:
        for path in pending.values():
            path.unlink(missing_ok=True)
        raise
    for name in (WEIGHTS, CONFIG, *([GATES] if own else [])):  # the weights' rename is the moment at which the new checkpoint exists
        os.replace(pending[name], folder / name)
    if not own:  # those of an earlier save belong to weights that are gone
        for path in (folder / GATES, pending_path(folder, GATES)):
            path.unlink(missing_ok=True)
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
    """Complete a save that stopped between its renames; its pending config is the only copy beside the header."""
    pending, gates, weights = pending_path(folder, CONFIG), pending_path(folder, GATES), folder / WEIGHTS
    if (pending.is_file() or gates.is_file()) and weights.is_file():
        try:
            header, tensors = open_weights(weights)
        except CheckpointError:
            return
        if pending.is_file() and header.get("adapter_config") == pending.read_text(errors="replace"):
            os.replace(pending, folder / CONFIG)
        if _gates_of(gates, digest(tensors)) is not None:
            os.replace(gates, folder / GATES)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of these tensors: names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key].detach().cpu().contiguous()
        found.update(f"{key} {t.dtype} {tuple(t.shape)}\n".encode())
        found.update(t.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_gates(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gates that were saved with these weights; {} where the folder has none. CheckpointError for those of other weights."""
    if not (folder / GATES).is_file() and not pending_path(folder, GATES).is_file():
        return {}
    own = digest(tensors)
    for path in (folder / GATES, pending_path(folder, GATES)):  # the latter of a save that stopped between its renames
        found = _gates_of(path, own)
        if found is not None:
            return found
    if not (folder / GATES).is_file():
        return {}
    header, _ = open_weights(folder / GATES)
    raise CheckpointError(
        f"load_adapter: {folder / GATES} was trained for other weights (SHA-256 {header.get(_DIGEST, 'missing')[:12]}...) than "
        f"those of {WEIGHTS} ({own[:12]}...); put the two files of one save together, or train the gates again."
    )


def _gates_of(path: Path, own: str) -> dict[str, Tensor] | None:
    """The tensors of a file of gates, if it is there and belongs to weights of this digest."""
    if not path.is_file():
        return None
    header, tensors = open_weights(path)
    return tensors if header.get(_DIGEST) == own else None


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
