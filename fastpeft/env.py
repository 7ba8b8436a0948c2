"""What a bug report needs: versions, devices, and what this build of fastpeft holds."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from fastpeft.ops import dropout

_PACKAGES = (
    "fastpeft", "torch", "triton", "peft", "transformers", "accelerate", "safetensors", "bitsandbytes", "numpy",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Name -> value of everything that `fastpeft env` prints. Versions are read from metadata: nothing is imported."""
    found = {"os": platform.platform(), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found |= {"cuda of torch": str(torch.version.cuda or "none"), "gpu": _gpus(), "threads": str(torch.get_num_threads())}
    return found | _extension() | {"dropout on the CPU": dropout.backend()}


def describe() -> str:
    """environment() as a markdown list, to paste into an issue."""
    return "\n".join(f"- {key}: {value}" for key, value in environment().items())


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    cards = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    return ", ".join(f"{card.name} (sm_{card.major}{card.minor})" for card in cards)


def _extension() -> dict[str, str]:
    extension = dropout._EXTENSION
    if extension is None:
        return {"extension": "not built: no C++ compiler was found when fastpeft was installed"}
    info = {key: str(value) for key, value in extension.build_info().items()}
    cuda = f"{info['cuda_sources']} for {info['cuda_architectures']}; no operation calls it yet"
    return {
        "extension": f"built with {info['compiler']}",
        "extension, CPU": info["cpu_sources"],
        "products on the CPU": info["isa"],
        "extension, CUDA": cuda if info["cuda_sources"] else "not built: no nvcc was found when fastpeft was installed",
    }
