"""One interleaved harness: error against fp64 first, then ratios to the frozen layer, as JSON lines.

Layers come from fastpeft.job.layerbench and the clock from fastpeft.job.measure; nothing of them is repeated here.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT, copy_start
from fastpeft.job.layerbench import Shape, layers
from fastpeft.job.measure import interleaved

AGAIN = "frozen again"
PEFT_SAME = "PEFT same dtype"
PEFT_FP32 = "PEFT fp32 adapters"


def machine() -> dict[str, Any]:
    """CPU model, vector flags, threads, torch."""
    info = Path("/proc/cpuinfo")
    fields = dict(s.split(":", 1) for s in info.read_text().splitlines() if ":" in s) if info.exists() else {}
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = [f for f in fields.get("flags", "").split() if f.startswith(("avx", "amx", "fma"))]
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cpu_flags": flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def arms(shape: Shape, method: str, rank: int = 8) -> dict[str, nn.Module]:
    """The layers on equal values, with a B that is not zero."""
    found = layers(shape, method, {"rank": rank, "alpha": 2 * rank})
    ours = found[FASTPEFT].linear.adapter.get_submodule(method)
    with torch.no_grad():
        ours.B.normal_(0, 0.02)
    wide = found.pop(PEFT)
    copy_start(found[FASTPEFT], wide, method)
    out = {FROZEN: found[FROZEN], AGAIN: copy.deepcopy(found[FROZEN])}
    same = copy.deepcopy(wide)
    for p in same.parameters():
        p.data = p.data.to(shape.dtype)
    out[PEFT_SAME] = same
    if shape.dtype != torch.float32:
        out[PEFT_FP32] = wide
    return out | {FASTPEFT: found[FASTPEFT]}


def formula(layer: nn.Module, method: str | None, x: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """y, dx, dA, dB of the paper's formula in `dtype` by autograd (DoRA in its authors' form; norm held constant)."""
    linear = layer.linear
    x = x.detach().to(dtype).requires_grad_()
    W, b = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
    y, wanted = x @ W.T, [x]
    if method is not None:
        own = linear.adapter.get_submodule(method)
        A, B = (t.detach().to(dtype).requires_grad_() for t in (own.A, own.B))
        wanted += [A, B]
        low = ((x @ A.T) @ B.T) * own.scale
        if method == "dora":
            norm = (W + own.scale * (B @ A)).detach().norm(dim=1)
            g = own.m.detach().to(dtype) / norm
            y = y + ((g - 1) * y + g * low)
        else:
            y = y + low
    y = y + b
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))]


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, dA, dB of an arm."""
    named = [(n.lower(), p) for n, p in layer.named_parameters() if p.requires_grad]
    factors = [
        p for key in ("a", "b") for n, p in named if n.endswith((f".{key}", f"lora_{key}.default.weight"))
    ]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], dy)]


def errors(got: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> tuple[float, bool]:
    """Largest error relative to the largest value, and whether each is at most twice the plain one plus one rounding."""
    worst, right = 0.0, len(got) == len(truth)
    for g, t, p in zip(got, truth, plain, strict=False):
        error, allowed = ((v.double() - t).abs().max().item() for v in (g, p))
        size = t.abs().max().item()
        worst = max(worst, error / size)
        right = right and error <= 2 * allowed + torch.finfo(p.dtype).eps * size
    return worst, right


def compare(name: str, shape: Shape, method: str, *, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per arm. ratio: median of its time to the frozen layer's in the same round; iqr: its quartiles."""
    torch.manual_seed(1)
    kw: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
    x = torch.randn(shape.tokens, shape.in_features, requires_grad=True, **kw)
    dy = torch.randn(shape.tokens, shape.out_features, **kw)
    found, checked = arms(shape, method), {}
    ours, plain_layer = found[FASTPEFT], found[FROZEN]
    for arm, layer in found.items():
        source, which = (plain_layer, None) if arm in (FROZEN, AGAIN) else (ours, method)
        truth = formula(source, which, x, dy, torch.float64)
        checked[arm] = errors(gradients(layer, x, dy), truth, formula(source, which, x, dy, shape.dtype))

    def step(layer: nn.Module) -> Callable[[], object]:
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        return lambda: torch.autograd.grad(layer(x), wanted, dy)

    wait = torch.cuda.synchronize if shape.device.startswith("cuda") else None
    timed = {arm: step(layer) for arm, layer in found.items() if checked[arm][1] or arm == FROZEN}
    seconds = interleaved(timed, rounds=rounds, wait=wait)
    for arm, layer in found.items():
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in layer.parameters() if p.requires_grad})
        row: dict[str, Any] = {
            "bench": name,
            "method": method,
            "arm": arm,
            "device": shape.device,
            "shape": [shape.tokens, shape.in_features, shape.out_features],
            "dtype": str(shape.dtype).removeprefix("torch."),
            "adapter_dtype": dtypes,
            "error": checked[arm][0],
            "right": checked[arm][1],
            "rounds": rounds,
        }
        if arm in seconds:
            ratios = [s / b for s, b in zip(seconds[arm], seconds[FROZEN], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row |= {"seconds": statistics.median(seconds[arm]), "ratio": middle, "iqr": [low, high]}
        yield row


def emit(row: dict[str, Any]) -> None:
    print(json.dumps(row | machine()), flush=True)
