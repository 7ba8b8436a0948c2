"""Stage recipes: every recipe and its variants in a small model on the device, held against the CPU; nothing is timed.

What comes out may be twice as far from fp64 on the CPU as the same model in the same dtypes on the CPU with impl torch, and the
roundings that fastpeft.verify allows a layer (float32: four, 16 bits: one), for each layer of the model. Distances are Frobenius
norms. TF32 is off, as by default. What is compared with fp64 is built on the CPU and copied, so nothing is drawn on the device.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastpeft
from bench.gpu.common import Row, Run, Task
from bench.gpu.correctness import table
from bench.machine import name_of
from fastpeft.method.rosa import RoSA
from fastpeft.ops.family import implementation
from fastpeft.registry import Method, every_recipe, get_recipe

__all__ = ["table", "tasks"]

WIDTH, HIDDEN, BLOCKS = 64, 96, 2
# what the defaults, made for wide layers, become here
SMALL: dict[str, Any] = {"rank": 4, "density": 0.05}
# an expert of moa is chosen by routers whose only loss is that of the labels, which these tasks leave out; a rank of random_masking
# is a count of entries
ALWAYS: dict[str, dict[str, Any]] = {"moa": {"train_router": False}, "random_masking": {"rank": None}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "aflora": [{"train_square": True}],
    "bilora": [{"values": "real"}, {"values": "sigmoid"}],
    "delta_lora": [{"inplace": True}],
    "dora": [{"grad": "full"}, {"rslora": True}],
    "dylora": [{"mode": "frozen"}],
    "galore": [{"proj_type": "full"}],
    "hydralora": [{"heads": 1}, {"heads": 9}],
    "loda": [{"base": "r", "base_rank": 16}, {"base": "s", "base_density": 0.5}, {"base": "s", "base_density": "2:4"}],
    "loha": [{"rank": 2}, {"rank": 12}, {"flavor": "lycoris", "rslora": True}],
    "lokr": [{"flavor": "lycoris", "full_matrix": True}, {"decompose_both": True, "rank": 1, "factor": 8}],
    "lora": [{"lora_bias": True}, {"start": "orthogonal"}, {"rank": 20}, {"quantize": "nf4"}, {"quantize": "int8"}],
    "lotr": [{"left": "svd", "right": "svd"}],
    "melora": [{"n": 4, "rank": 2}],
    "moa": [{"experts": 3, "frozen": 1}, {"pool": "last", "router_bias": True}],
    "o_lora": [{"previous": 2}],
    "phatgoose": [{"experts": 4, "k": 2}],
    "pissa": [{"fold": True}, {"bits": 4, "iterations": 2, "alpha": 4}, {"niter": 4}],
    "random_masking": [
        *({"apply": a} for a in ("window", "exact")),
        {"overlay": True}, {"rank": 2, "density": None}, {"structure": "head"},
    ],
    "rosa": [{"apply": "window"}, {"apply": "exact"}, {"overlay": True}],
    "superlora": [{"core": "cp"}, {"shuffle": True}, {"fold": "matrix", "groups": "layer"}, {"rho": 0.5}],
}  # fmt: skip


class Spec(NamedTuple):
    """A recipe with options of its own."""

    method: str
    options: Mapping[str, Any]

    @property
    def case(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.options.items()) or "default"


class Block(nn.Module):
    """A feed-forward block, which methods may also stand beside."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Blocks in a list. With labels: {"loss", "logits"}."""

    def __init__(self, blocks: int = BLOCKS):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.in_features = self.out_features = WIDTH

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x if labels is None else {"loss": (x - labels).square().mean(), "logits": x}


def specs() -> Iterator[Spec]:
    for recipe in every_recipe():
        for options in ({}, *VARIANTS.get(recipe.name, [])):
            yield Spec(recipe.name, options)


def dtypes_of(run: Run, spec: Spec) -> list[torch.dtype]:
    """What is written into a 16-bit weight step by step would be lost, and is refused."""
    return [torch.float32] if "inplace" in spec.options else run.dtypes


def options_of(spec: Spec) -> dict[str, Any]:
    known = get_recipe(spec.method).options
    own = {k: v for k, v in SMALL.items() if k in known} | ALWAYS.get(spec.method, {}) | dict(spec.options)
    return {k: v for k, v in own.items() if v is not None}


def adapted(spec: Spec, dtype: torch.dtype, device: str = "cpu", blocks: int = BLOCKS) -> Net:
    """In training mode, every trainable number away from its start; on the CPU the same in each call."""
    torch.manual_seed(1)
    model = Net(blocks).to(dtype).to(device)
    fastpeft.adapt(model, spec.method, **options_of(spec))
    return moved(model)


@torch.no_grad()
def moved(model: Net) -> Net:
    generator = torch.Generator().manual_seed(2)
    for m in model.modules():
        if isinstance(m, RoSA) and m.values is not None and not m.masked:
            rows, columns = m.shape
            flat = torch.randperm(rows * columns, generator=generator)[: m.values.numel()].sort().values
            m.set_mask(torch.stack([flat // columns, flat % columns]).int())
    for name, p in model.named_parameters():
        # routers that disagree clearly, so that rounding changes no choice
        size = 1.0 if name.startswith("adapter_shared") and p.shape[-1] == WIDTH else 0.1
        if p.requires_grad or size == 1.0:
            p.add_((size * torch.randn(p.shape, generator=generator)).to(p))
    return attached(model).train()  # type: ignore[return-value]


def attached(model: nn.Module) -> nn.Module:
    """As with their procedures, which a copy loses."""
    for m in model.modules():
        if isinstance(m, Method):
            m.attached = True
    return model


def placed(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> Any:
    found = copy.deepcopy(model).to(device)
    return attached(found if dtype is None else found.to(dtype))


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and dy [3, 11, width] on the CPU."""
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(3, 11, WIDTH, generator=generator).to(dtype) for _ in range(2))
    return x, dy


def outcome(model: Any, x: Tensor, dy: Tensor, call: Any = None) -> dict[str, Tensor]:
    """y, dx and the gradient of every trainable parameter, in fp64 on the CPU; zeros where there is none."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    p = next(iter(model.parameters()))
    wide = p.dtype is torch.float64
    x, dy = (t.to(p.device, torch.float64 if wide else t.dtype) for t in (x, dy))
    x = x.detach().clone().requires_grad_()
    y = (model if call is None else call)(x)
    grads = torch.autograd.grad(y, [x, *own.values()], dy, allow_unused=True)
    pairs = zip(["dx", *own], [x, *own.values()], grads, strict=True)
    found = {"y": y.detach()} | {n: torch.zeros_like(p) if g is None else g for n, p, g in pairs}
    return {n: t.double().cpu() for n, t in found.items()}


def roundings(dtype: torch.dtype, layers: int) -> float:
    return layers * (4 if dtype is torch.float32 else 1) * torch.finfo(dtype).eps


def judged(got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor], allowed: float) -> Row:
    """`allowed`: share of each tensor's norm. error: the largest, relative to the tensor's norm."""
    worst, wrong = 0.0, []
    for name, want in truth.items():
        error, reference = (float((v[name] - want).norm()) for v in (got, plain))
        size = float(want.norm())
        worst = max(worst, error / max(size, 1e-300)) if size else worst
        # a NaN is not smaller
        if not error <= 2 * reference + allowed * size:
            wrong.append(f"{name} {error:.1e} (CPU {reference:.1e}, size {size:.1e})")
    return {"error": worst, "right": not wrong, "wrong": "; ".join(wrong[:6])}


def tasks(run: Run) -> Iterator[Task]:
    from bench.gpu import recipes_models, recipes_peft, recipes_train

    yield from layer_tasks(run)
    yield from verify_tasks(run)
    yield from folder_tasks(run)
    yield from recipes_train.tasks(run)
    yield from recipes_models.tasks(run)
    yield from recipes_peft.tasks(run)
    yield from compile_tasks(run)
    # a capture that fails may leave its process in disorder
    yield from graph_tasks(run)


def layer_tasks(run: Run) -> Iterator[Task]:
    for spec in specs():
        for dtype in dtypes_of(run, spec):
            for impl in ("triton", "torch"):
                row = {"check": "recipe", "what": spec.method, "case": f"{spec.case}, {impl} {name_of(dtype)}"}
                yield row, lambda spec=spec, dtype=dtype, impl=impl: _layers(run, spec, dtype, impl)


def _layers(run: Run, spec: Spec, dtype: torch.dtype, impl: str) -> Row:
    model, (x, dy) = adapted(spec, dtype), data(dtype)
    truth, plain = known(model, x, dy)
    with implementation(impl):
        got = outcome(placed(model, run.device), x, dy)
    return judged(got, truth, plain, roundings(dtype, 2 * BLOCKS))


def known(model: Any, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """fp64 and the model's own dtypes, on the CPU."""
    with implementation("torch"):
        return outcome(placed(model, "cpu", torch.float64), x, dy), outcome(placed(model, "cpu"), x, dy)


def verify_tasks(run: Run) -> Iterator[Task]:
    """fastpeft.verify on a model that was built on the device."""
    for spec in specs():
        for dtype in dtypes_of(run, spec)[:2]:
            row = {"check": "verify", "what": spec.method, "case": f"{spec.case}, {name_of(dtype)}"}
            yield row, lambda spec=spec, dtype=dtype: _verify(run, spec, dtype)


def _verify(run: Run, spec: Spec, dtype: torch.dtype) -> Row:
    x = data(dtype)[0].to(run.device)
    found = fastpeft.verify(adapted(spec, dtype, run.device).eval(), x)
    beside = get_recipe(spec.method).site != "linear"
    right = not found.wrong and bool(found.layers or beside) and not found.unreached
    shares = [d.error / d.size for layer in found.layers.values() for d in layer.values() if d.size]
    return {"error": max(shares, default=0.0), "right": right, "wrong": "" if right else str(found)[:600]}


def folder_tasks(run: Run) -> Iterator[Task]:
    """save_adapter and load_adapter, merge and unload, all on the device."""
    for spec in specs():
        row = {"check": "save and leave", "what": spec.method, "case": spec.case}
        yield row, lambda spec=spec: _folder(run, spec)


def _folder(run: Run, spec: Spec) -> Row:
    dtype, found = torch.float32, []
    model = placed(adapted(spec, dtype), run.device).eval()
    x = data(dtype)[0].to(run.device)
    base = {n: p for n, p in _fresh(run, dtype).state_dict().items()}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = model(x)
        fastpeft.save_adapter(model, Path(folder) / "a")
        again = _fresh(run, dtype)
        fastpeft.load_adapter(again, Path(folder) / "a")
        gap = float((again.eval()(x) - want).norm() / want.norm())
        found += [] if gap <= roundings(dtype, 2 * BLOCKS) else [f"loaded again: {gap:.1e}"]
        if next(m for m in fastpeft.methods() if m.name == spec.method).mergeable and "quantize" not in spec.options:
            gap = float((fastpeft.merge(copy.deepcopy(model))(x) - want).norm() / want.norm())
            found += [] if gap <= 2 * roundings(dtype, 2 * BLOCKS) else [f"merged: {gap:.1e}"]
        recipe = get_recipe(spec.method)
        if not recipe.cls.TRAINS_ALL and "quantize" not in spec.options:
            left = {n.replace(".base_layer", ""): p for n, p in fastpeft.unload(model).state_dict().items()}
            found += [f"unloaded: {n}" for n, p in base.items() if n not in left or not torch.equal(p, left[n])]
    return {"right": not found, "wrong": "; ".join(found[:4])}


def _fresh(run: Run, dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype).to(run.device)


def compile_tasks(run: Run) -> Iterator[Task]:
    """torch.compile(fullgraph=True) of one block, forward and backward."""
    for spec in specs():
        row = {"check": "torch.compile", "what": spec.method, "case": spec.case}
        yield row, lambda spec=spec: _compiled(run, spec)


def _compiled(run: Run, spec: Spec) -> Row:
    torch._dynamo.reset()
    dtype = torch.float32
    model, (x, dy) = adapted(spec, dtype, blocks=1), data(dtype)
    truth, plain = known(model, x, dy)
    with implementation("triton"):
        there = placed(model, run.device)
        compiled = torch.compile(there, fullgraph=True, backend="aot_eager" if run.dry else "inductor")
        return judged(outcome(there, x, dy, compiled), truth, plain, roundings(dtype, 2))


def graph_tasks(run: Run) -> Iterator[Task]:
    """A step of the default recipe captured as a CUDA graph."""
    for spec in (Spec(recipe.name, {}) for recipe in every_recipe()):
        row = {"check": "CUDA graph", "what": spec.method, "case": "default"}
        yield row, lambda spec=spec: _graph(run, spec)


def _graph(run: Run, spec: Spec) -> Row:
    from bench.arms import Arm
    from bench.gpu.graphs import graph_check

    model: Any = placed(adapted(spec, run.dtype, blocks=1), run.device)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return graph_check(run, Arm(spec.method, "fastpeft", spec.method, model, own, {}, 1.0))
