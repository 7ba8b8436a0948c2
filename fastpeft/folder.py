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
    """All files, or none; meta: fastpeft's own notes.

    OSError leaves the folder with the checkpoint it held before; one after the weights' rename, with the new one, whose config the
    reader then takes from beside it.
    """
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
        os.replace(pending[WEIGHTS], folder / WEIGHTS)  # the moment at which the new checkpoint exists
    except BaseException:
        for path in pending.values():
            path.unlink(missing_ok=True)
        raise
    for name in (CONFIG, *([GATES] if own else [])):
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
    """Config, tensors, and fastpeft's own notes ({} in a file that PEFT wrote).

    FileNotFoundError for a file that is not there, CheckpointError for everything else that is wrong with one.
    """
    try:
        return _read_folder(folder)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise CheckpointError(f"load_adapter: {e.filename or folder} cannot be read ({e.strerror or e}).") from e


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    weights, config = folder / WEIGHTS, folder / CONFIG
    if not weights.is_file():
        _refuse_no_file(weights)
        pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
        if pickles:
            raise CheckpointError(
                f"load_adapter: {folder} holds {pickles[0]} (pickle), which is never read; convert it once with PEFT: "
                f"PeftModel.from_pretrained(model, {str(folder)!r}).save_pretrained(new_folder)."
            )
        raise FileNotFoundError(f"load_adapter: {weights} does not exist; give the folder that holds {CONFIG} and {WEIGHTS}.")
    header, tensors = open_weights(weights)
    try:
        meta = parse_json(header.get(LIBRARY, "{}"))
        if not isinstance(meta, dict) or not isinstance(meta.get("options", {}), dict):
            raise ValueError("it is no object with options")
        if not _is_names(meta.get("methods", [])):
            raise ValueError(f"its methods are {meta['methods']!r}, needed a list of names")
    except ValueError as e:
        raise CheckpointError(f"load_adapter: the {LIBRARY!r} entry in the header of {weights} is damaged: {e}") from e
    return _read_config(folder, config, header.get("adapter_config")), tensors, meta


def open_weights(weights: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file; CheckpointError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), framework="pt") as file:
            found = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        with open(weights, "rb") as raw:  # of a name that stands there twice safetensors gives the last one's tensor
            parse_json(raw.read(int.from_bytes(raw.read(8), "little")).decode())
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"load_adapter: {weights} is no readable safetensors file (truncated or damaged): {e}") from e
    return found


def parse_json(text: str) -> Any:
    """What the text says. ValueError for what is no JSON, nests too deeply, or says one name of an object twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    found = dict(pairs)
    if len(found) < len(names):
        raise ValueError(f"it holds {', '.join(repr(n) for n in found if names.count(n) > 1)} twice; keep one")
    return found


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, str) for n in value)


def _refuse_no_file(path: Path) -> None:
    """Raise where something stands in a file's place; nothing where there is nothing."""
    if path.is_dir():
        raise CheckpointError(f"load_adapter: {path} is a directory; an adapter folder holds {CONFIG} and {WEIGHTS} as files.")
    if path.is_symlink():
        raise FileNotFoundError(f"load_adapter: {path} is a link to {os.readlink(path)}, which does not exist; put the file itself there.")
    if path.exists():
        raise CheckpointError(f"load_adapter: {path} is no regular file; put the file itself there.")


def _read_config(folder: Path, path: Path, embedded: str | None) -> dict[str, Any]:
    # undecodable bytes become characters that no config has, and fail as JSON below
    text = path.read_text(errors="replace") if path.is_file() else None
    pending = pending_path(folder, CONFIG)
    if embedded is not None and text != embedded and pending.is_file() and pending.read_text(errors="replace") == embedded:
        text = embedded  # a save was interrupted between its two renames: the new weights are in place, so is their config
    if text is None:
        _refuse_no_file(path)
        raise FileNotFoundError(f"load_adapter: {path} does not exist; an adapter folder holds {CONFIG} and {WEIGHTS}.")
    config = _config_in(text, str(path))
    was = config if embedded is None else _config_in(embedded, f"'adapter_config' in the header of {folder / WEIGHTS}")
    if config != was and text != embedded:  # NaN does not equal itself
        changed = {k: (was.get(k), config.get(k)) for k in {*was, *config} if was.get(k) != config.get(k)}
        raise CheckpointError(
            f"load_adapter: {path} is not the config that {WEIGHTS} was saved with; differing (saved, now): {changed}. "
            "Restore those values; the saved config is in the weights' header under 'adapter_config'."
        )
    return config


def _config_in(text: str, where: str) -> dict[str, Any]:
    try:
        config = parse_json(text)
        if "\ufffd" in text:
            raise ValueError("it holds bytes that are not UTF-8")
    except ValueError as e:
        raise CheckpointError(f"load_adapter: {where} is no JSON that can be used: {e}") from e
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"load_adapter: {where} has no peft_type; it must be an object as PEFT or fastpeft writes it.")
    return config
