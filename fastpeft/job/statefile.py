"""The state of an unfinished run as one file: a line with its sha256, then what torch.save wrote.

It is replaced by one rename, so a kill at any moment leaves the old file or the new one. Reading runs no code
from the file (weights_only), and any damaged byte is noticed.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

# the writes of adapter folders and of this file are to be safe in the same way
from fastpeft.folder import pending_path, replace_file
from fastpeft.job.errors import JobError

NAME = "resume.state"
_MAGIC = b"fastpeft run 2 sha256 "


def write(folder: Path, state: dict[str, Any]) -> None:
    """Replace the state in `folder`; OSError leaves the one that was there. state: tensors and plain data."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    replace_file(folder / NAME, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read(folder: Path) -> dict[str, Any] | None:
    """The state in `folder`, tensors on the CPU; None if there is none. JobError, with nothing changed, for a
    file that is damaged or of another kind."""
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise JobError(f"finetune: {path}: cannot be read ({e.strerror or e}).") from None
    head, _, body = data.partition(b"\n")
    if head != _MAGIC + hashlib.sha256(body).hexdigest().encode():
        what = (
            "truncated or damaged"
            if head.startswith(_MAGIC)
            else "no state that this version of fastpeft writes"
        )
        raise JobError(_unusable(path, f"it is {what} ({len(data):,d} bytes)"))
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as e:
        raise JobError(_unusable(path, str(e).splitlines()[0])) from None


def exists(folder: Path) -> bool:
    return (folder / NAME).exists()


def remove(folder: Path) -> None:
    """Remove the state, and what an interrupted write may have left beside it."""
    for path in (folder / NAME, pending_path(folder, NAME)):
        path.unlink(missing_ok=True)


def _unusable(path: Path, why: str) -> str:
    return (
        f"finetune: {path}: this state cannot be continued: {why}. Nothing was changed. Put an intact copy there, or start "
        "the run again with --restart; an adapter/ folder beside it is a file of its own and still loads."
    )
