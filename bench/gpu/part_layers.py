"""Whole layers of the methods whose terms are differentiated whole, as arms, and what is right for those with entries of
their own (bench.oracle knows the others).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.arms import Arm, peft_name
from bench.gpu.part_sparse import support
from bench.machine import name_of
from bench.oracle import check as check_dense
from bench.oracle import distance
from fastpeft.job.arms import FASTPEFT, PEFT
from fastpeft.job.layerbench import Shape, layers

# name -> method, its options at [33, 40 -> 36], and at [2048, 4096 -> 4096]
LAYERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "loha": ("loha", {"rank": 2}, {"rank": 8}),
    "loha whole": ("loha", {"rank": 6}, {"rank": 64}),
    "lokr": ("lokr", {"rank": 2, "factor": 4}, {"rank": 8, "factor": 16}),
    "krona": ("krona", {}, {}),
    **{
        f"random_masking {apply}": (
            "random_masking",
            {"density": 0.05, "apply": apply},
            {"density": 0.003, "apply": apply},
        )
        for apply in ("copy", "window", "exact")
    },
    "rosa": ("rosa", {"rank": 3, "density": 0.05}, {"rank": 16, "density": 0.003}),
}
# above the crossover the update is formed as a whole, by torch whatever impl says
NO_KERNEL = ("loha whole",)


@dataclass
class SparseArm(Arm):
    """index: where its values stand.   exact: whether they are added without rounding to W's dtype."""

    index: Tensor = field(default_factory=lambda: torch.empty(2, 0, dtype=torch.int32))
    exact: bool = False


def layer_arm(size: Shape, title: str, method: str, options: Mapping[str, Any]) -> Arm:
    """fastpeft's layer with no parameter at zero, all exact in the layer's dtype; RoSA's has its mask."""
    holder: Any = layers(size, method, options)[FASTPEFT]
    own = holder.linear.adapter.get_submodule(method)
    parameters = dict(own.named_parameters())
    start = started(parameters, size.dtype)
    common = (title, "fastpeft", method, holder.linear, parameters, start, getattr(own, "scale", 1.0))
    if "values" not in parameters:
        return Arm(*common)
    if method == "rosa":
        own.set_mask(support(size.out_features, size.in_features, own.values.numel(), size.device))
    return SparseArm(*common, index=own.index, exact=own.apply_as == "exact")


@torch.no_grad()
def started(parameters: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    """The values in fp64; what starts at zero gets large ones, beside which a 16-bit base product hides no fault."""
    for p in parameters.values():
        if not p.any():
            p.normal_(0, 0.5)
        p.copy_(p.to(dtype))
    return {name: p.detach().double() for name, p in parameters.items()}


def shira_arms(size: Shape, title: str, rank: int) -> Iterator[Arm]:
    """PEFT's SHiRA on a mask and values of its own, with values in the layer's dtype and in fp32."""
    wide: Any = layers(size, "random_masking", {"rank": rank})[PEFT]
    values = wide.base_model.model.linear.shira_weight
    start = started({"values": values["default"]}, size.dtype)
    same = copy.deepcopy(wide)
    for p in same.parameters():
        p.data = p.data.to(size.dtype)
    for dtype, model in {name_of(size.dtype): same, "float32": wide}.items():
        layer = model.base_model.model.linear
        index = layer.shira_indices["default"].to(size.device)
        parameters = {"values": layer.shira_weight["default"]}
        yield SparseArm(
            peft_name(title, dtype), "PEFT", "random_masking", layer, parameters, start, index=index
        )


def formula(arm: SparseArm, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """y, dx and the gradient of each parameter, in `dtype`.

    Unless exact, W + value is rounded to W's dtype where it is used, and the values' gradient is that of the unrounded sum.
    """
    frozen: Any = getattr(arm.layer, "base_layer", arm.layer)
    W, b = frozen.weight.detach().clone(), frozen.bias.detach().to(dtype)
    at, x = tuple(arm.index.long()), x.detach().to(dtype).requires_grad_()
    p = {name: t.to(dtype).requires_grad_() for name, t in arm.start.items()}
    values = p["values"]
    if not arm.exact:
        W[at] = (W[at].float() + arm.start["values"].float()).to(W.dtype)
        values = values - values.detach()
    delta = torch.zeros_like(W, dtype=dtype).index_put(at, values)
    y = x @ W.to(dtype).T + x @ delta.T + b
    if arm.method == "rosa":
        y = y + arm.scale * (x @ p["A"].T @ p["B"].T)
    grads = torch.autograd.grad(y, [x, *p.values()], dy.to(dtype))
    return dict(zip(("y", "dx", *(f"d{name}" for name in p)), (y.detach(), *grads), strict=True))


def check(arm: Arm, x: Tensor, dy: Tensor) -> tuple[float, list[str]]:
    """Largest error of y and every gradient relative to the largest value of its tensor, and the names of what is wrong."""
    if not isinstance(arm, SparseArm):
        return check_dense(arm, x, dy)
    with arm.using():
        y = arm.forward(x)
        grads = torch.autograd.grad(y, [x, *arm.parameters.values()], dy)
    names = ("y", "dx", *(f"d{name}" for name in arm.parameters))
    got = dict(zip(names, (y.detach(), *grads), strict=True))
    return distance(got, *(formula(arm, x, dy, d) for d in (torch.float64, x.dtype)))
