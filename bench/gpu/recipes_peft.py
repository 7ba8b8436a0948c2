"""Of stage recipes: fastpeft.accelerate beside stock PEFT on the same device.

The truth is stock PEFT in fp64 on the CPU; what the accelerated model computes may be twice as far from it as stock PEFT on the
device in the same dtypes, and the roundings that stage recipes allows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft
from bench.gpu.common import Row, Run, Task
from bench.gpu.recipes import Mlp, data, judged, roundings
from bench.machine import name_of
from fastpeft.ops.family import implementation

NAMES = ["up", "down"]
# family -> its config; LoHa's scale is one that fp32 holds, to which PEFT rounds it
FAMILIES: dict[str, Callable[[Any], Any]] = {
    "lora": lambda peft: peft.LoraConfig(r=4, lora_alpha=10, target_modules=NAMES),
    "rslora": lambda peft: peft.LoraConfig(r=4, lora_alpha=10, use_rslora=True, target_modules=NAMES),
    "lora_bias": lambda peft: peft.LoraConfig(r=4, lora_alpha=10, lora_bias=True, target_modules=NAMES),
    "pissa": lambda peft: peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=NAMES),
    "dora": lambda peft: peft.LoraConfig(r=4, lora_alpha=10, use_dora=True, target_modules=NAMES),
    "adalora": lambda peft: peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=7, total_step=10, target_modules=NAMES),
    "loha": lambda peft: peft.LoHaConfig(r=4, alpha=10, target_modules=NAMES),
    "lokr": lambda peft: peft.LoKrConfig(r=2, alpha=10, target_modules=NAMES),
    "shira": lambda peft: peft.ShiraConfig(r=2, target_modules=NAMES, random_seed=1),
}


def kinds(run: Run) -> dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]]:
    """Base, adapters, autocast."""
    wide, low = torch.float32, torch.float16 if run.dry else torch.bfloat16
    found = {
        "fp32": (wide, wide, None),
        f"{name_of(low)} base": (low, wide, None),
        f"{name_of(low)}": (low, low, None),
        "autocast": (wide, wide, low),
        f"autocast, {name_of(low)} base": (low, wide, low),
    }
    return found if run.dry else found | {"fp16 base": (torch.float16, wide, None)}


def tasks(run: Run) -> Iterator[Task]:
    for family in FAMILIES:
        for name, kind in kinds(run).items():
            row = {"check": "accelerate", "what": family, "case": name}
            yield row, lambda family=family, kind=kind: _family(run, family, kind)
    for fused in (False, True):
        row = {"check": "GradScaler", "what": "lora", "case": "fused AdamW" if fused else "AdamW"}
        yield row, lambda fused=fused: _scaled(run, fused)


def stock(family: str, base: torch.dtype, adapters: torch.dtype) -> nn.Module:
    """On the CPU, every trainable number away from its start; magnitudes stay positive."""
    import peft

    torch.manual_seed(1)
    model: Any = peft.get_peft_model(Mlp(), FAMILIES[family](peft), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = 0.3 * torch.randn(p.shape, generator=generator)
                p.add_(noise.abs() if "magnitude" in name else noise)
            p.data = p.data.to(base if "base_layer" in name else adapters)
    return model.train()


def outcome(model: nn.Module, device: str, x: Tensor, dy: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    x = x.to(device).clone().requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *own.values()], dy.to(device, y.dtype), allow_unused=True)
    found = {"y": y.detach()} | dict(zip(["dx", *own], grads, strict=True))
    return {n: t.double().cpu() for n, t in found.items() if t is not None}


def _family(run: Run, family: str, kind: tuple[torch.dtype, torch.dtype, torch.dtype | None]) -> Row:
    base, adapters, autocast = kind
    model, low = stock(family, base, adapters), autocast or base
    x, dy = (t.to(base) for t in data(torch.float16 if low is torch.float16 else torch.bfloat16))
    truth = outcome(copy.deepcopy(model).double(), "cpu", x.double(), dy.double())
    theirs = copy.deepcopy(model).to(run.device)
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours)
    fastpeft.reset_calls()
    plain = outcome(theirs, run.device, x, dy, autocast)
    with implementation("triton"):
        got = outcome(ours, run.device, x, dy, autocast)
    row = judged(got, truth, plain, roundings(low, 2))
    fused, left = sum(fastpeft.fused_calls().values()), fastpeft.peft_calls()
    if fused != 2 or left:
        row |= {"right": False, "wrong": f"{fused} of 2 layers fused: {left}; {row['wrong']}"}
    return row


def _scaled(run: Run, fused: bool) -> Row:
    """fp16 autocast, two good steps and one that overflows: parameters as stock PEFT's, by the distance that they moved; the same scale."""
    x, dy = (t.to(run.device) for t in data(torch.float32))
    start = stock("lora", torch.float32, torch.float32).to(run.device)
    ends, scales = [], []
    for ours in (True, False):
        model = copy.deepcopy(start)
        if ours:
            fastpeft.accelerate(model)
        own = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(own, lr=0.01, eps=1e-3, fused=fused)
        scaler = torch.amp.GradScaler(torch.device(run.device).type, init_scale=1024.0)
        with implementation("triton" if ours else "torch"):
            for factor in (1.0, float("inf"), 1.0):
                with torch.autocast(torch.device(run.device).type, dtype=torch.float16):
                    loss = (model(x) * dy).mean() * factor
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in own]).double().cpu())
        scales.append(scaler.get_scale())
    before = torch.cat([p.detach().flatten() for p in start.parameters() if p.requires_grad]).double().cpu()
    moved, gap = float((ends[1] - before).norm()), float((ends[0] - ends[1]).norm())
    # fp16's rounding of gradients, in each layer's products
    right = moved > 0 and gap <= 2 * roundings(torch.float16, 4) * moved and scales == [512.0, 512.0]
    wrong = "" if right else f"apart by {gap:.1e}, moved {moved:.1e}, scales {scales}"
    return {"error": gap / max(moved, 1e-300), "right": right, "wrong": wrong}


