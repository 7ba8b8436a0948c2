"""One pass over the training data: what the posterior's curvature is made of.

For a factor M [p, q] that makes z = u M^T, N samples, tokens t and classes c of probability p_c at the mode:

    U = sum over n, t of u u^T      G = sum over n, t, c of p_c g g^T,  g = d(-log p_c) / dz      curvature = G (x) U / (N T)

Classes are summed over and not sampled. Padded positions count neither in U and G nor in N T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.laplace.batch import Reader, attended, class_labels, class_logits, to_device
from fastpeft.laplace.kronecker import Factor, Gram
from fastpeft.laplace.observe import Call, Layer, factor_name, find_layers, observe, reaches, read_by, sweep
from fastpeft.laplace.posterior import Posterior
from fastpeft.option_checks import check_int
from fastpeft.targets import Targets

SCALES = ("tokens", "samples")


@torch.inference_mode(False)
@torch.no_grad()
def fit(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    logits: Callable[[nn.Module, Any], Tensor] = class_logits,
    labels: Callable[[Any], Tensor] = class_labels,
    mask: Callable[[Any], Tensor | None] = attended,
    sites: Targets = "all",
    n_kfac: int | None = 10,
    large: int = 512,
    token_scale: str = "tokens",
    precision: float = 1.0,
) -> Posterior:
    """The posterior over the trained A and B of an adapted model, in eval mode. Afterwards `tune` its prior precision.

    loader: batches of the training data, in any split and order.   logits(model, batch) -> [samples, classes]; laplace.answers for
        language models.   labels(batch) -> [samples].   mask(batch) -> [samples, tokens], zero where padded, or None.
        By default a batch is a mapping as Transformers take it, or (input, labels). Its tensors are moved to the factors' device.
    sites: "all"; "last", the adapted layer that runs last (for the paper's LLLA that is the output head); or names or a regex.
    n_kfac: eigenvalues kept of a side larger than `large`; None keeps all sides whole.
    token_scale: "samples" divides by samples instead of tokens, as the authors' code does.   precision: of the prior, to start with.
    The model keeps its mode, gradients and flags. ValueError where batches, logits or adapters are not what this needs.
    """
    if token_scale not in SCALES:
        raise ValueError(f"laplace.fit: token_scale={token_scale!r}; it must be one of {', '.join(SCALES)}.")
    if n_kfac is not None:
        check_int("laplace.fit", "n_kfac", n_kfac, 1, None, "large sides")
    check_int("laplace.fit", "large", large, 0, None, "each factor")
    read = Reader(logits, labels, mask)
    layers = find_layers(model, "all" if sites == "last" else sites)
    curves: dict[str, Curvature] = {}
    total, samples = 0.0, 0
    for batch in loader:
        batch = to_device(batch, next(iter(layers.values())).A.device)
        if sites == "last" and not samples:
            layers = _last(model, layers, read, batch)
        f, calls = observe(model, layers, lambda b=batch: read.read_logits(model, b))
        log_p = f.detach().double().log_softmax(1)
        total += log_p.gather(1, read.read_labels(batch, f)[:, None]).sum().item()
        samples += len(f)
        padding = read.mask(batch)
        keeps = [_unpadded(call, padding) for call in calls]
        for call, keep in zip(calls, keeps, strict=True):
            x = call.x[keep].double()
            for name, leaf, layer in _factors(call, layers):
                if name not in curves:
                    curves[name] = Curvature(layer, leaf, n_kfac, large)
                curves[name].read(x)
        for grads in sweep(f, calls, class_cotangents(log_p.exp())):
            for call, keep, dy in zip(calls, keeps, grads, strict=True):
                if dy is None:
                    continue
                dy = dy[keep].double()
                for name, _, _ in _factors(call, layers):
                    curves[name].reach(dy)
    if not samples:
        raise ValueError("laplace.fit: the loader gave no sample.")
    factors = {name: c.factor(c.tokens if token_scale == "tokens" else samples) for name, c in _in_order(layers, curves)}
    settings = {"sites": list(layers), "n_kfac": n_kfac, "large": large, "token_scale": token_scale, "samples": samples}
    return Posterior(model, read, layers, factors, torch.as_tensor(precision, dtype=torch.float64), total, settings)


def class_cotangents(p: Tensor) -> list[Tensor]:
    """sqrt(p_c) d(-log p_c) / df = sqrt(p_c) (p - e_c) for each class, [samples, classes]."""
    eye = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return [p[:, c : c + 1].sqrt() * (p - eye[c]) for c in range(p.shape[1])]


@dataclass
class Curvature:
    """U and G of one factor while they are collected."""

    layer: Layer
    leaf: str
    n_kfac: int | None
    large: int
    tokens: int = 0
    U: Gram = field(init=False)
    G: Gram = field(init=False)

    def __post_init__(self) -> None:
        M = self.mode
        # the narrow side, of the rank, is always whole
        self.G = self._gram(M.shape[0], self.leaf == "B")
        self.U = self._gram(M.shape[1], self.leaf == "A")

    @property
    def mode(self) -> Tensor:
        M = self.layer.A if self.leaf == "A" else self.layer.B
        return M.detach()

    def _gram(self, size: int, wide: bool) -> Gram:
        return Gram(size, self.n_kfac if wide and size > self.large else None, self.mode.device)

    def read(self, x: Tensor) -> None:
        rows = read_by(self.layer, self.leaf, x)
        self.tokens += len(rows)
        self.U.add(rows)

    def reach(self, dy: Tensor) -> None:
        self.G.add(reaches(self.layer, self.leaf, dy))

    def factor(self, count: int) -> Factor:
        return Factor(self.mode.clone(), self.G.eigen(), self.U.eigen(1 / count))


def _factors(call: Call, layers: dict[str, Layer]) -> Iterator[tuple[str, str, Layer]]:
    layer = layers[call.site]
    for leaf in layer.random:
        yield factor_name(call.site, leaf), leaf, layer


def _in_order(layers: dict[str, Layer], curves: dict[str, Curvature]) -> Iterator[tuple[str, Curvature]]:
    """In the order of the model's modules; ValueError for a layer that never ran."""
    for site, layer in layers.items():
        for leaf in layer.random:
            name = factor_name(site, leaf)
            if name not in curves:
                raise ValueError(f"laplace.fit: {site!r} never ran; leave it out (sites=), or give data that reaches it.")
            yield name, curves[name]


def _last(model: nn.Module, layers: dict[str, Layer], read: Reader, batch: Any) -> dict[str, Layer]:
    """The layer that runs last, alone."""
    _, calls = observe(model, layers, lambda: read.read_logits(model, batch))
    return {calls[-1].site: layers[calls[-1].site]}


def _unpadded(call: Call, mask: Tensor | None) -> Tensor:
    """bool [samples, tokens] of the call's input; a layer that reads one vector of each sample has no padding."""
    if mask is None or len(call.lead) == 1:
        return torch.ones(call.x.shape[:2], dtype=torch.bool, device=call.x.device)
    if tuple(mask.shape) != call.lead:
        raise ValueError(
            f"laplace.fit: the mask is {tuple(mask.shape)}, and {call.site!r} reads {call.lead} vectors; give mask= a function of "
            "the batch that fits, or one that returns None."
        )
    return mask.to(call.x.device) != 0
