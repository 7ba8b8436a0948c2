"""The layers of bench.experts: eight experts of one linear, under fastpeft and under stock PEFT, each with its formula.

Every arm has the same frozen weight, and factors that are exact in the layer's dtype. Its formula gives y from its own leaves in
fp64; which experts a token uses is taken from what the arm itself chose, so that no rounding is called an error.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpeft
from bench.machine import name_of
from fastpeft.job.layerbench import Shape, _Holder
from fastpeft.method.phatgoose import choose, standardised
from fastpeft.ops import lowrank

EXPERTS, RANK, K, SEQUENCES = 8, 16, 2, 8
NAMES = [f"e{z}" for z in range(EXPERTS)]
ONE = "fastpeft lora"
Leaves = dict[str, Tensor]


@dataclass
class Arm:
    """leaves: what gets a gradient beside x.   formula(x, leaves, W x): y from tensors of any dtype, without the bias.

    adapter_dtype: of the factors.   library: "torch", "PEFT" or "fastpeft".
    """

    name: str
    library: str
    forward: Callable[[Tensor], Tensor]
    leaves: Leaves
    formula: Callable[[Tensor, Leaves, Tensor], Tensor]
    adapter_dtype: str = ""


def inputs(shape: Shape) -> tuple[Tensor, Tensor, nn.Linear]:
    """x [sequences, tokens, in], dy, and the frozen layer."""
    torch.manual_seed(0)
    linear = nn.Linear(shape.in_features, shape.out_features, dtype=shape.dtype).requires_grad_(False)
    lead = (SEQUENCES, shape.tokens // SEQUENCES)
    x = torch.randn(*lead, shape.in_features).to(shape.dtype).requires_grad_()
    return x, torch.randn(*lead, shape.out_features).to(shape.dtype), linear


def arms(shape: Shape, x: Tensor, linear: nn.Linear) -> Iterator[Arm]:
    plain = lambda x, own, base: base  # noqa: E731
    for name in ("frozen", "frozen again"):
        yield Arm(name, "torch", linear, {}, plain)
    yield _lora(linear)
    yield _phatgoose(linear, x)
    yield _hydralora(linear)
    yield _moa(linear)
    for dtype in dict.fromkeys((shape.dtype, torch.float32)):
        yield from _peft(linear, x, dtype)


def _adapted(linear: nn.Linear, method: str, **options: Any) -> tuple[nn.Module, Any]:
    """(a model of this one layer, its method), the weight shared, factors so large that no base product hides a fault, and exact in the layer's dtype."""
    twin = nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype, device="meta")
    twin.weight, twin.bias = linear.weight, linear.bias
    holder = _Holder(twin)
    torch.manual_seed(1)
    fastpeft.adapt(holder, method, target_modules=["linear"], **options)
    own = holder.linear.adapter.get_submodule(method)
    own.attached = True
    with torch.no_grad():
        for p in own.parameters():
            if not p.any():
                p.normal_(0, 0.5)
            p.copy_(p.to(linear.weight.dtype))
    return holder, own


def _lora(linear: nn.Linear) -> Arm:
    holder, own = _adapted(linear, "lora", rank=RANK, alpha=RANK)
    return Arm(ONE, "fastpeft", holder, {"A": own.A, "B": own.B}, lambda x, p, base: base + x @ p["A"].T @ p["B"].T, name_of(own.A.dtype))


def _phatgoose(linear: nn.Linear, x: Tensor) -> Arm:
    holder, own = _adapted(linear, "phatgoose", experts=EXPERTS, rank=RANK, alpha=RANK, k=K)
    with torch.no_grad():
        p = lowrank.down(x.flatten(0, 1), standardised(own.V), x.dtype, seed=None, p=0.0, blocks=1).view(*x.shape[:-1], EXPERTS)
        index, _ = choose(K, p, x)

    def formula(x: Tensor, q: Leaves, base: Tensor) -> Tensor:
        scores = F.layer_norm(x, x.shape[-1:]) @ F.layer_norm(q["V"], q["V"].shape[-1:]).T / x.shape[-1] ** 0.5
        w = torch.zeros_like(scores).scatter(-1, index, torch.softmax(scores.gather(-1, index), -1))
        return base + mixed(x, q["A"], q["B"], w)

    leaves = {"A": own.A, "B": own.B, "V": own.V}
    return Arm(f"fastpeft phatgoose, k={K}", "fastpeft", holder, leaves, formula, name_of(own.A.dtype))


def _hydralora(linear: nn.Linear) -> Arm:
    holder, own = _adapted(linear, "hydralora", heads=EXPERTS, rank=RANK, alpha=RANK)

    def formula(x: Tensor, q: Leaves, base: Tensor) -> Tensor:
        w, u = torch.softmax(x @ q["G"].T, -1), x @ q["A"].T
        heads = q["B"].unflatten(1, (EXPERTS, RANK))
        for z in range(EXPERTS):
            base = base + w[..., z : z + 1] * (u @ heads[:, z].T)
        return base

    leaves = {"A": own.A, "B": own.B, "G": own.G}
    return Arm(f"fastpeft hydralora, {EXPERTS} heads", "fastpeft", holder, leaves, formula, name_of(own.A.dtype))


def _moa(linear: nn.Linear) -> Arm:
    """Teacher forcing: a label for each sequence; the router runs as it does in training, and its loss is the procedure's."""
    holder, own = _adapted(linear, "moa", experts=EXPERTS, rank=RANK, alpha=RANK)
    domain = torch.arange(SEQUENCES) % EXPERTS
    leaves = {"A": own.A, "B": own.B}
    return Arm("fastpeft moa", "fastpeft", lambda x: holder(x, domain=domain), leaves, by_sequence, name_of(own.A.dtype))


def mixed(x: Tensor, A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """sum_z w_z x A_z^T B_z^T; A [Z * r, in], B [out, Z * r], w [..., Z]."""
    total = torch.zeros((), dtype=x.dtype)
    for z in range(EXPERTS):
        at = slice(z * RANK, (z + 1) * RANK)
        total = total + w[..., z : z + 1] * (x @ A[at].T @ B[:, at].T)
    return total


def by_sequence(x: Tensor, q: Leaves, base: Tensor) -> Tensor:
    w = F.one_hot(torch.arange(SEQUENCES) % EXPERTS, EXPERTS).to(x.dtype)
    return base + mixed(x, q["A"], q["B"], w[:, None])


def _peft(linear: nn.Linear, x: Tensor, dtype: torch.dtype) -> Iterator[Arm]:
    """One PEFT layer: with one adapter; with eight, in a loop, under X-LoRA's layer, and with a name for each sequence."""
    head = f"PEFT {{}}, {name_of(dtype)} adapters"
    layer = _peft_layer(linear, dtype, NAMES[:1])
    one = {"A": layer.lora_A.e0.weight, "B": layer.lora_B.e0.weight}
    yield Arm(head.format("lora"), "PEFT", layer, one, lambda x, p, base: base + x @ p["A"].T @ p["B"].T, name_of(dtype))

    torch.manual_seed(2)
    best = torch.randn(*x.shape[:-1], EXPERTS).topk(K, -1)
    weight = torch.zeros(*x.shape[:-1], EXPERTS).scatter(-1, best[1], torch.softmax(best[0], -1)).to(x.dtype).requires_grad_()
    layer = _peft_layer(linear, dtype, NAMES)
    leaves = {f"A{z}": layer.lora_A[n].weight for z, n in enumerate(NAMES)} | {f"B{z}": layer.lora_B[n].weight for z, n in enumerate(NAMES)}

    def stacked(q: Leaves) -> Leaves:
        every = range(EXPERTS)
        return {"A": torch.cat([q[f"A{z}"] for z in every]), "B": torch.cat([q[f"B{z}"] for z in every], 1)}

    def weighted(x: Tensor, q: Leaves, base: Tensor) -> Tensor:
        own = stacked(q)
        return base * q["w"].sum(-1, keepdim=True) + mixed(x, own["A"], own["B"], q["w"])

    def loop(x: Tensor) -> Tensor:
        total: Any = 0
        for z, name in enumerate(NAMES):
            layer.set_adapter(name)
            total = total + weight[..., z : z + 1] * layer(x)
        for leaf in leaves.values():  # set_adapter freezes the others
            leaf.requires_grad_(True)
        return total

    yield Arm(head.format("loop over 8"), "PEFT", loop, leaves | {"w": weight}, weighted, name_of(dtype))

    xlora = _xlora(linear, dtype, leaves)

    def once(x: Tensor, q: Leaves, base: Tensor) -> Tensor:
        own = stacked(q)
        return base + mixed(x, own["A"], own["B"], q["w"])

    yield Arm(head.format("X-LoRA layer"), "PEFT", lambda x: xlora(x, scalings=weight[:, :, None]), leaves | {"w": weight}, once, name_of(dtype))

    other = _peft_layer(linear, dtype, NAMES, leaves)
    names = [NAMES[z % EXPERTS] for z in range(SEQUENCES)]
    sequence = lambda x, q, base: by_sequence(x, stacked(q), base)  # noqa: E731
    yield Arm(head.format("adapter_names batch"), "PEFT", lambda x: other(x, adapter_names=names), leaves, sequence, name_of(dtype))


def _peft_layer(linear: nn.Linear, dtype: torch.dtype, names: list[str], leaves: Leaves | None = None) -> Any:
    """PEFT's LoRA layer over this very linear; every adapter active and trainable; leaves: whose factors it shares."""
    import peft

    model = peft.get_peft_model(_Holder(linear), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"]))
    layer: Any = model.base_model.model.linear
    layer.set_adapter(names)
    torch.manual_seed(3)
    for z, name in enumerate(names):
        for part, key in ((layer.lora_A, "A"), (layer.lora_B, "B")):
            w = part[name].weight
            if leaves is not None:
                part[name].weight = leaves[f"{key}{z}"]
                continue
            with torch.no_grad():
                w.normal_(0, 0.5 if key == "B" else w.shape[1] ** -0.5)
            w.data = w.data.to(linear.weight.dtype).to(dtype)
            w.requires_grad_(True)
    return layer


def _xlora(linear: nn.Linear, dtype: torch.dtype, leaves: Leaves) -> Any:
    """PEFT X-LoRA's own layer around a LoRA layer; the weights are given, as its classifier would give them."""
    from peft import XLoraConfig
    from peft.tuners.xlora.layer import XLoraLinearLayer

    layer = _peft_layer(linear, dtype, NAMES, leaves)
    config = XLoraConfig(hidden_size=linear.in_features, adapters=dict.fromkeys(NAMES, ""))
    return XLoraLinearLayer(types.SimpleNamespace(disabled=False), layer, layer.forward, 0, config).forward  # type: ignore[arg-type]
