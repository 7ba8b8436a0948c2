"""What an adapter file holds, without a model: `fastpeft inspect`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpeft.folder import PREFIX, open_weights, read_folder, read_gates


@dataclass(frozen=True)
class Kind:
    """Tensors of one leaf name in modules that differ by their numbers alone: how many, their shapes, and their numbers.

    module: with * for a number.   size: their mean Frobenius norm.   zeros: tensors that are zero throughout.   broken: with NaN or Inf.
    """

    module: str
    leaf: str
    count: int
    shapes: list[list[int]]
    dtype: str
    numbers: int
    size: float
    zeros: int
    broken: int


@dataclass
class Inspection:
    """kind: peft_type, or "file" for one without a config.   config: adapter_config.json.   notes: what fastpeft wrote beside it.

    gates: how many of PHATGOOSE's lie in the folder.   size: bytes of the tensors.
    """

    path: str
    kind: str
    config: dict[str, Any]
    notes: dict[str, Any]
    tensors: list[Kind] = field(default_factory=list)
    gates: int = 0
    size: int = 0

    @property
    def numbers(self) -> int:
        return sum(k.numbers for k in self.tensors)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}, {self.numbers:,d} numbers, {self.size:,d} bytes"]
        if self.notes:
            lines.append(f"written by fastpeft as {' + '.join(self.notes.get('methods', ['?']))}")
        shown = {k: v for k, v in self.config.items() if v not in (None, False, {}, [], "") and k not in ("peft_type", "target_modules")}
        lines += [f"  {k}: {v}" for k, v in sorted(shown.items())]
        targets = self.config.get("target_modules")
        if targets is not None:
            lines.append(f"  target_modules: {f'{len(targets)} names' if isinstance(targets, list) else targets}")
        rows = [("module", "tensor", "count", "shape", "dtype", "numbers", "norm", "")]
        for k in self.tensors:
            shape = " ".join("x".join(map(str, s)) or "scalar" for s in k.shapes[:3]) + (" ..." if len(k.shapes) > 3 else "")
            marks = [f"{n} {what}" for n, what in ((k.zeros, "zero"), (k.broken, "with NaN or Inf")) if n]
            rows.append((k.module, k.leaf, str(k.count), shape, k.dtype, f"{k.numbers:,d}", f"{k.size:.3g}", ", ".join(marks)))
        widths = [max(len(r[c]) for r in rows) for c in range(8)]
        lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        if self.gates:
            lines.append(f"gates of PHATGOOSE for {self.gates} layers, bound to these weights")
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read an adapter folder of fastpeft or PEFT, or a .safetensors file of kohya or LyCORIS.

    FileNotFoundError; CheckpointError for what is damaged.
    """
    where = Path(path)
    if where.is_file():
        _, tensors = open_weights(where)
        return _inspection(Inspection(str(where), "file", {}, {}), tensors)
    config, tensors, notes = read_folder(where)
    found = Inspection(str(where), str(config["peft_type"]), config, notes, gates=len(read_gates(where, tensors)))
    return _inspection(found, tensors)


def _inspection(found: Inspection, tensors: Mapping[str, Tensor]) -> Inspection:
    groups: dict[tuple[str, str, str], list[Tensor]] = {}
    for key, t in tensors.items():
        module, leaf = _split(key)
        groups.setdefault((re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", module), leaf, str(t.dtype).removeprefix("torch.")), []).append(t)
    for (module, leaf, dtype), own in groups.items():
        wide = [_wide(t) for t in own]
        shapes = Counter(tuple(t.shape) for t in own)
        found.tensors.append(
            Kind(
                module, leaf, len(own), [list(s) for s, _ in shapes.most_common()], dtype, sum(t.numel() for t in own),
                sum(float(t.norm()) for t in wide) / len(own),
                sum(not bool(t.any()) for t in wide), sum(not bool(t.isfinite().all()) for t in wide),
            )
        )
    found.size = sum(t.numel() * t.element_size() for t in tensors.values())
    return found


def _wide(t: Tensor) -> Tensor:
    """Its numbers in float64 (complex128); NaN for those of a dtype that torch cannot read, such as float4_e2m1fn_x2."""
    try:
        return t.to(torch.complex128 if t.dtype.is_complex else torch.float64)
    except RuntimeError:
        return torch.full(t.shape, torch.nan, dtype=torch.float64)


def _split(key: str) -> tuple[str, str]:
    """Module and leaf of a key; a leaf such as lora_A.weight has two parts."""
    parts = key.removeprefix(PREFIX).split(".")
    cut = 2 if len(parts) > 2 and parts[-2].startswith("lora_") else 1
    return ".".join(parts[:-cut]), ".".join(parts[-cut:])
