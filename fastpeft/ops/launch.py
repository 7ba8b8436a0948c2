"""What every Triton operation needs before a launch: the kernels, and tensors that Triton takes.

Triton is imported by the first launch, never by `import fastpeft`. Nothing here falls back: what cannot run raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastpeft.ops.dropout import _check_p as check_p

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACKAGE = "fastpeft.triton_kernels"


@functools.cache
def kernels(stem: str) -> ModuleType:
    """fastpeft.triton_kernels.<stem>. Raises RuntimeError where Triton is not installed."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"fastpeft's {stem} kernels need Triton, which is not installed; pip install triton, or use impl='torch'."
        ) from error
    if importlib.util.find_spec(_PACKAGE) is None:
        _load_checkout()
    return importlib.import_module(f"{_PACKAGE}.{stem}")


def _load_checkout() -> None:
    """In a checkout that was not installed the package lies beside fastpeft, not in it."""
    folder = Path(__file__).resolve().parents[2] / "triton_kernels"
    spec = importlib.util.spec_from_file_location(
        _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE] = module
    spec.loader.exec_module(module)


@functools.cache
def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set before Triton was imported."""
    kernel = kernels("lowrank").sum_kernel
    from triton.runtime.jit import JITFunction

    return not isinstance(kernel, JITFunction)


def check(
    who: str, *, seed: Tensor | None = None, p: float = 0.0, **tensors: Tensor | None
) -> contextlib.AbstractContextManager[object]:
    """The device guard for a launch on these tensors. Raises if one has a dtype, or they have a device, that cannot run."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        check_dtype(who, name, tensor.dtype)
    check_p(who, p)
    if p > 0.0 and seed is None:
        raise ValueError(f"{who}: p={p} needs a seed, a 0-dim int64 tensor; pass one, or p=0.")
    first, device = next((name, tensor.device) for name, tensor in given.items())
    for name, tensor in (given if seed is None else given | {"seed": seed}).items():
        if tensor.device != device:
            raise RuntimeError(
                f"{who}: {name} is on {tensor.device} but {first} is on {device}; move one of them."
            )
    if device.type == "cuda":
        return torch.cuda.device(device)
    if not interpreting():
        raise RuntimeError(
            f"{who}: {first} is on {device}, and Triton kernels need a GPU; move the tensors there, use impl='torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported to run the kernels in its interpreter."
        )
    return contextlib.nullcontext()


def check_dtype(who: str, name: str, dtype: torch.dtype) -> None:
    """Raises TypeError for fp64 and whatever else a kernel does not take."""
    if dtype not in DTYPES:
        raise TypeError(
            f"{who}: {name} is {dtype}; Triton kernels take float32, bfloat16 or float16; cast it, or use impl='torch', "
            "which does float64."
        )
