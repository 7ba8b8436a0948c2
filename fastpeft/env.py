"""What a bug report needs: versions, devices, and what this build of fastpeft holds."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from fastpeft.ops import dropout

_PACKAGES = ("fastpeft", "torch", "triton", "peft", "transformers", "accelerate", "safetensors", "bitsandbytes", "numpy")


def environment() -> dict[str, str]:
    """Name -> value of everything that `fastpeft env` prints."""
    found = {"os": platform.platform(), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found |= {"cuda of torch": str(torch.version.cuda or "none"), "gpu": gpu, "threads": str(torch.get_num_threads())}
    extension = dropout._EXTENSION
    if extension is None:
        found["extension"] = "not built: no C++ compiler was found when fastpeft was installed"
    else:
        found |= {f"extension {key}": str(value) or "none" for key, value in extension.build_info().items()}
    return found | {"dropout": dropout.backend()}


def describe() -> str:
    """environment() as a markdown list."""
    return "\n".join(f"- {key}: {value}" for key, value in environment().items())
