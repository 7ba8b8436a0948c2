"""fastpeft.verify: is what runs here right? The user's own layers, device, dtypes and data, against float64 and plain PyTorch.

The model runs once on the given arguments. At every adapted linear layer that is reached, forward and backward run three times on
the x that came: as they are, by the definition of the terms in the same dtypes, and by the definition in float64. What came out may be
twice as far from float64 as the plain composition is, and a rounding (float32: four) of its dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.adapter import base_of, is_conv1d, release
from fastpeft.base import Plain
from fastpeft.ops.dropout import draw_seed
from fastpeft.ops.family import implementation
from fastpeft.record import adapted_modules
from fastpeft.reference import in_dtype, reference
from fastpeft.targets import is_linear_layer

# of the largest value. float32: one for each product between x and a gradient, as sums in another order may be luckier; float64: the truth is
# no better than what is compared, and only the order of sums differs
_ROUNDINGS = {"float32": 4, "float64": 4096}


@dataclass(frozen=True)
class Difference:
    """error, plain: largest |difference| from float64 of what fastpeft computes and of plain PyTorch.   size: largest |value|.

    dtype: what the layer computes in (gradients of fp32 adapters on a 16-bit layer come out of 16-bit values).
    """

    error: float
    plain: float
    size: float
    dtype: str

    @property
    def right(self) -> bool:
        """False for NaN too."""
        rounding = torch.finfo(getattr(torch, self.dtype)).eps * self.size
        return self.error <= 2 * self.plain + _ROUNDINGS.get(self.dtype, 1) * rounding


@dataclass
class Verification:
    """layers: name -> quantity ("y", "dx", or a parameter's name) -> Difference.   unreached: adapted layers that the call did not
    come to.   untested: name -> why nothing was compared there.   str() is a table of the worst.

    untrained: name -> why, of the model's parameters that train and got no use of a step: no gradient, one that is not finite, or zero before and
    after it. None where the call gave no loss.
    """

    layers: dict[str, dict[str, Difference]] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    untested: dict[str, str] = field(default_factory=dict)
    untrained: dict[str, str] | None = None

    @property
    def wrong(self) -> list[str]:
        """"layer: quantity" of everything that is too far off."""
        return [f"{name}: {what}" for name, found in self.layers.items() for what, d in found.items() if not d.right]

    @property
    def right(self) -> bool:
        """Nothing is wrong, and something was compared."""
        return bool(self.layers) and not self.wrong

    def __str__(self) -> str:
        rows = [("quantity", "dtype", "worst error", "of the largest value", "plain PyTorch's there", "layer")]
        worst: dict[tuple[str, str], tuple[float, str, Difference]] = {}
        for name, found in self.layers.items():
            for what, d in found.items():
                share = d.error / max(d.size, 1e-300)
                key = what.rpartition(".")[2], d.dtype
                if key not in worst or not share <= worst[key][0]:
                    worst[key] = share, name, d
        for (what, dtype), (share, name, d) in worst.items():
            rows.append((what, dtype, f"{d.error:.1e}", f"{share:.1e}", f"{d.plain:.1e}", name))
        widths = [max(len(r[k]) for r in rows) for k in range(6)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines += [f"WRONG  {what}" for what in self.wrong]
        lines += [f"not compared: {name}: {why}" for name, why in self.untested.items()]
        if self.unreached:
            lines.append(f"not reached by this call: {', '.join(self.unreached)}")
        if self.untrained is None:
            lines.append("gradients of a loss: not looked at, as the call gives none (labels=..., or a model that returns a number)")
        else:
            lines += [f"does not train: {name}: {why}" for name, why in self.untrained.items()]
        lines.append(f"{len(self.layers)} layers compared with float64, {len(self.wrong)} quantities wrong")
        return "\n".join(lines)


def verify(model: nn.Module, *args: Any, **kwargs: Any) -> Verification:
    """Call model(*args, **kwargs) and compare every adapted linear layer on the way with float64; model is left as it was.

    model: adapted by fastpeft, or one AdaptedLinear. Its mode counts: in training mode dropout is compared too, with its own mask. A layer that is
    called several times is compared at its first call. Gradients are those of a random dy, in x and in every parameter of the layer that trains.
    Where the call returns a loss (`.loss`, or a tensor of one number) its gradients are taken too, before and after a small step that is undone:
    `untrained`. A choice among experts that is a tie to rounding may fall otherwise in float64, and then looks wrong.
    RuntimeError if no layer was reached. ValueError for a model without adapted layers.
    """
    layers = adapted_modules(model)
    if not layers:
        raise ValueError(f"verify: this {type(model).__name__} has no adapted layer; call fastpeft.adapt first.")
    found = Verification()
    handles = []
    for name, module in layers.items():
        if not is_linear_layer(module):
            found.untested[name] = f"{type(module).__name__} is no linear layer: its adapter sits beside a whole block"
        else:
            handles.append(module.register_forward_hook(_hook(name, found), with_kwargs=True))
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    with torch.random.fork_rng(devices):
        found.untrained = untrained(model, *args, **kwargs)
    found.unreached = [n for n in layers if n not in found.layers and n not in found.untested]
    if not found.layers and not found.untested:
        raise RuntimeError(f"verify: the call reached none of the {len(layers)} adapted layers; was it the adapted module that ran?")
    return found


def _hook(name: str, found: Verification) -> Callable[[Any, tuple[Any, ...], dict[str, Any], Tensor], None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if name in found.layers:
            return
        if not module.adapter.enabled:
            found.untested[name] = "its adapter is switched off"
            return
        (x,) = (*args, *kwargs.values())
        found.layers[name] = compare(module, x)

    return hook


@torch.enable_grad()
def compare(module: Any, x: Tensor) -> dict[str, Difference]:
    """Output, dx and the gradient of every parameter that trains, of one adapted linear layer on x [..., in]."""
    torch.manual_seed(0)
    own = _trainable(module)
    x = x.detach().requires_grad_()
    y = module.forward(x)
    torch.manual_seed(0)
    seed, dy = draw_seed(x.device), torch.randn_like(y)
    got = _gradients(y, x, own, dy)
    release(module)  # an overlay in the weight is a term here
    plain_y = _plain(module, x, seed, y.dtype)
    plain = _gradients(plain_y, x, own, dy)
    truth = _in_float64(module, x, seed, dy)
    return {
        name: Difference(
            _gap(t, truth[name]), _gap(plain[name], truth[name]), float(truth[name].abs().max()) if t.numel() else 0.0,
            str(y.dtype).removeprefix("torch."),
        )
        for name, t in got.items()
    }  # fmt: skip


def _gap(t: Tensor, truth: Tensor) -> float:
    if t.shape != truth.shape:
        return float("inf")
    return float((t.double() - truth).abs().max()) if t.numel() else 0.0


def _trainable(module: Any) -> dict[str, Tensor]:
    """Parameters that train, by name: the adapter's, those that it shares with other layers, and the layer's own."""
    found: dict[str, Tensor] = {f"adapter.{n}": p for n, p in module.adapter.named_parameters()}
    for name, method in module.adapter.methods().items():
        if (holder := _holder(method)) is not None:
            found |= {f"adapter.{name}.shared.{n}": p for n, p in holder.named_parameters()}
    found |= {n: p for n, p in module.named_parameters(recurse=False)}
    return {n: p for n, p in found.items() if p.requires_grad}


def _holder(method: nn.Module) -> nn.Module | None:
    """What the method shares with other layers, which lies outside of the module tree."""
    return method.__dict__.get("holder")


def _gradients(y: Tensor, x: Tensor, own: Mapping[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """y, dx, and the gradient of each of `own`; zeros where y does not depend on it."""
    grads = torch.autograd.grad(y, [x, *own.values()], dy, allow_unused=True)
    pairs = zip(["dx", *own], [x, *own.values()], grads, strict=True)
    return {"y": y.detach()} | {n: torch.zeros_like(p) if g is None else g for n, p, g in pairs}


def _plain(module: Any, x: Tensor, seed: Tensor, dtype: torch.dtype) -> Tensor:
    base = base_of(module)
    weight = module.weight if module.weight is not None and module.weight.requires_grad else None
    W = base.weight().to(dtype) if weight is None else (weight.t() if is_conv1d(module) else weight).to(dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    terms = module.adapter.terms(base)
    with torch.autocast(x.device.type, enabled=False):
        return reference(x.to(dtype), W.clone(), bias, [in_dtype(t, dtype) for t in terms], seed)


def _in_float64(module: Any, x: Tensor, seed: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The same with everything widened before anything is computed."""
    # what was decided for the forward that runs is no part of the copy
    decided = [getattr(_holder(m), "routing", None) for m in module.adapter.methods().values()]
    wide, x = copy.deepcopy(module.adapter, {id(r): r for r in decided if r is not None}), x.detach().double().requires_grad_()
    for part in (wide, *(h for m in wide.methods().values() if (h := _holder(m)) is not None)):
        for p in part.parameters():
            if p.is_floating_point():
                p.data = p.data.double()
        for b in part.buffers():
            if b.is_floating_point():
                b.data = b.data.double()
    W, bias = base_of(module).weight().double().clone(), module.bias
    leaves = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    if "weight" in leaves:
        W = leaves["weight"].t() if is_conv1d(module) else leaves["weight"]
    bias = leaves.get("bias", None if bias is None else bias.detach().double())
    for name, method in module.adapter.methods().items():
        wide.methods()[name].attached = method.attached  # a copy has no procedure of its own, and needs none: it takes no step
    with torch.autocast(x.device.type, enabled=False), implementation("torch"):
        terms = [in_dtype(t, torch.float64) for t in wide.terms(Plain(W))]
        y = reference(x, W, bias, terms, seed)
    shell = copy.copy(module)
    shell._modules = module._modules | {"adapter": wide}
    own = {n: p for n, p in _trainable(shell).items() if n not in leaves} | leaves
    return _gradients(y, x, {n: own[n] for n in _trainable(module)}, dy.double())


@torch.enable_grad()
def untrained(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str] | None:
    """Verification.untrained of this call. No parameter, gradient or mode is changed; torch's generator is."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad and p.numel()}

    def gradients() -> dict[str, Tensor | None] | None:
        loss = _loss(model(*args, **kwargs))
        if loss is None:
            return None
        return dict(zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True))

    before = gradients()
    if before is None:
        return None
    kept = {n: p.detach().clone() for n, p in own.items()}
    try:
        with torch.no_grad():
            for n, p in own.items():
                g = before[n]
                if g is not None and g.isfinite().all() and g.any():
                    p.sub_(0.01 * g / g.abs().max())
        after = gradients()
    finally:
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(kept[n])
    assert after is not None
    return {n: why for n in own if (why := _unmoved(before[n], after[n])) is not None}


def _unmoved(*grads: Tensor | None) -> str | None:
    found = [g for g in grads if g is not None]
    if not found:
        return "the loss does not depend on it"
    if not all(bool(g.isfinite().all()) for g in found):
        return "its gradient is not finite"
    return None if any(bool(g.any()) for g in found) else "its gradient is zero, before a step and after it"


def _loss(output: Any) -> Tensor | None:
    """What a call returned that can be minimised, if something can."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    one = isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad
    return loss.reshape(()) if one else None
