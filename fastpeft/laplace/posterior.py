"""The posterior itself: evidence, prior precision, and the predictive of the model linearised at its mode.

    log evidence = log p(D) - (precision |mode|^2 + sum of logdet P - n log precision) / 2
    logits ~ N(f, S),  S = sum over factors of J P^-1 J^T
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.laplace.batch import Reader, to_device
from fastpeft.laplace.kronecker import Factor, Projected
from fastpeft.laplace.observe import Layer, factor_name, observe, reaches, read_by, sweep

KINDS = ("mc", "probit", "map")
# added to the covariance of the logits before its Cholesky factor, as in the authors' code
JITTER = 1e-6
CHUNK = 1 << 22


@dataclass
class Posterior:
    """What laplace.fit returns. precision: of the prior, one number or one for each factor [factors], in the order of `factors`.

    It belongs to the values that the factors had when it was fitted: with others, everything below raises RuntimeError.
    log_likelihood: of the training data at the mode.   settings: what fit was told, and the number of samples.
    """

    model: nn.Module
    read: Reader
    layers: dict[str, Layer]
    factors: dict[str, Factor]
    precision: Tensor
    log_likelihood: float
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self._each(None)

    def log_evidence(self, precision: Tensor | float | None = None) -> Tensor:
        """Laplace's approximation of log p(training data | precision), fp64 and differentiable in the precision."""
        each = self._each(precision)
        total = each.new_full((), self.log_likelihood)
        for lam, factor in zip(each, self.factors.values(), strict=True):
            fit = lam * factor.mode.double().square().sum().to(lam.device)
            total = total - (fit + factor.logdet(lam.to(factor.mode.device)).to(lam.device) - factor.mode.numel() * lam.log()) / 2
        return total

    def tune(self, *, steps: int = 100, lr: float = 0.1, per_factor: bool = False) -> float:
        """Set the precision to where the evidence is highest, by Adam on its logarithm from where it is; returns the log evidence.

        per_factor: one precision for each factor.
        """
        self._descend(lambda precision: -self.log_evidence(precision), steps, lr, per_factor)
        return self.log_evidence().item()

    @torch.inference_mode(False)
    @torch.no_grad()
    def tune_on(
        self, loader: Iterable[Any], *, steps: int = 100, lr: float = 0.1, samples: int = 1000, per_factor: bool = False, seed: int = 0
    ) -> float:
        """Set the precision to where held-out data are likeliest, by Adam on its logarithm; returns their mean -log p.

        All of loader's Jacobians are kept meanwhile. samples: normal draws of the predictive, the same in each step.
        """
        kept, labels = [], []
        for batch in loader:
            batch = self._placed(batch)
            f, seen = self._project(batch)
            kept.append((f, seen))
            labels.append(self.read.read_labels(batch, f))
        if not kept:
            raise ValueError("laplace.tune_on: the loader gave no sample.")
        f = kept[0][0]
        draws = torch.randn(samples, 1, f.shape[1], dtype=f.dtype, generator=torch.Generator().manual_seed(seed)).to(f.device)

        def loss(precision: Tensor) -> Tensor:
            p = torch.cat([_mean_softmax(f, self._covariance(seen, precision), draws) for f, seen in kept])
            return -p.gather(1, torch.cat(labels)[:, None]).log().mean()

        self._descend(loss, steps, lr, per_factor)
        return loss(self.precision).item()

    @torch.inference_mode(False)
    @torch.no_grad()
    def logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Mean [samples, classes] and covariance [samples, classes, classes] of the logits, fp64."""
        f, seen = self._project(self._placed(batch))
        return f, self._covariance(seen, self.precision)

    @torch.inference_mode(False)
    @torch.no_grad()
    def predict(
        self, batch: Any, kind: str = "mc", *, samples: int = 100_000, generator: torch.Generator | None = None
    ) -> Tensor:
        """Class probabilities [samples, classes], fp64.

        kind: "mc", the mean softmax over `samples` draws of the logits; "probit", softmax(f / sqrt(1 + pi/8 variance)), which looks at
            variances alone; "map", softmax(f) of the trained model.   generator: for the draws.
        The likeliest class may be another than the model's where variances differ between three or more classes.
        """
        _check_kind(kind)
        if kind == "map":
            self._check_mode()
            batch = self._placed(batch)
            return observe(self.model, self.layers, lambda: self.read.read_logits(self.model, batch))[0].detach().double().softmax(1)
        return predictive(*self.logits(batch), kind, samples=samples, generator=generator)

    @torch.inference_mode(False)
    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any], kind: str = "mc", **options: Any) -> tuple[Tensor, Tensor]:
        """(probabilities, labels) of all of loader's samples, as laplace.scores takes them; options: of predict."""
        p, y = [], []
        for batch in loader:
            batch = self._placed(batch)
            p.append(self.predict(batch, kind, **options))
            y.append(self.read.read_labels(batch, p[-1]))
        return torch.cat(p), torch.cat(y)

    def matrix(self, name: str) -> Tensor:
        """The posterior precision of one factor, dense [n, n] over its entries in rows; for small factors."""
        at = list(self.factors).index(name)
        return self.factors[name].matrix(self._each(None)[at])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write laplace.safetensors into `folder`, beside the adapter that save_adapter writes there."""
        from fastpeft.laplace.store import save

        save(self, folder)

    def _each(self, precision: Tensor | float | None) -> Tensor:
        """One precision for each factor."""
        device = next(iter(self.factors.values())).mode.device
        lam = torch.as_tensor(self.precision if precision is None else precision, dtype=torch.float64, device=device)
        if lam.dim() > 1 or (lam.dim() == 1 and len(lam) != len(self.factors)) or not bool((lam > 0).all()):
            raise ValueError(
                f"laplace: precision is {lam.tolist()}; it must be a positive number, or one for each of {len(self.factors)} factors."
            )
        return lam.expand(len(self.factors))

    def _descend(self, loss: Any, steps: int, lr: float, per_factor: bool) -> None:
        start = self._each(None).clone() if per_factor else self.precision
        if not per_factor and start.dim():
            raise ValueError("laplace: precision has one number for each factor; tune with per_factor=True, or set one number first.")
        with torch.inference_mode(False), torch.enable_grad():
            log = start.detach().clone().log().requires_grad_()
            optimizer = torch.optim.Adam([log], lr=lr)
            for _ in range(steps):
                optimizer.zero_grad()
                loss(log.exp()).backward()
                optimizer.step()
            self.precision = log.detach().exp()

    def _covariance(self, seen: dict[str, Projected], precision: Tensor) -> Tensor:
        each = self._each(precision)
        shares = [f.covariance(seen[n], lam.to(f.mode.device)) for (n, f), lam in zip(self.factors.items(), each, strict=True)]
        return torch.stack([s.to(each.device) for s in shares]).sum(0)

    def _project(self, batch: Any) -> tuple[Tensor, dict[str, Projected]]:
        """The logits at the mode, and their Jacobian in each factor."""
        self._check_mode()
        f, calls = observe(self.model, self.layers, lambda: self.read.read_logits(self.model, batch))
        eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
        J: dict[str, list[Tensor]] = {name: [] for name in self.factors}
        for grads in sweep(f, calls, [e.expand_as(f) for e in eye]):
            row = {n: torch.zeros(len(f), *t.mode.shape, dtype=torch.float64, device=t.mode.device) for n, t in self.factors.items()}
            for call, dy in zip(calls, grads, strict=True):
                layer = self.layers[call.site]
                for leaf in layer.random if dy is not None else ():
                    row[factor_name(call.site, leaf)] += reaches(layer, leaf, dy).mT @ read_by(layer, leaf, call.x)
            for name, of_class in row.items():
                J[name].append(of_class)
        return f.detach().double(), {name: factor.project(torch.stack(J[name], 1)) for name, factor in self.factors.items()}

    def _placed(self, batch: Any) -> Any:
        return to_device(batch, next(iter(self.layers.values())).A.device)

    def _check_mode(self) -> None:
        for site, layer in self.layers.items():
            for leaf in layer.random:
                now = layer.A if leaf == "A" else layer.B
                mode = self.factors[factor_name(site, leaf)].mode
                if now.device != mode.device or not torch.equal(now, mode):
                    raise RuntimeError(
                        f"laplace: {leaf} of {site!r} is not what it was when this posterior was fitted (or lies on another device); fit "
                        "a new one, or put the trained values back."
                    )


@torch.no_grad()
def predictive(
    f: Tensor, S: Tensor, kind: str = "mc", *, samples: int = 100_000, generator: torch.Generator | None = None
) -> Tensor:
    """Class probabilities [samples, classes] of logits with mean f and covariance S, what Posterior.logits returns; as Posterior.predict."""
    _check_kind(kind)
    if kind == "map":
        return f.softmax(1)
    if kind == "probit":
        return (f / (1 + math.pi / 8 * S.diagonal(dim1=1, dim2=2)).sqrt()).softmax(1)
    total, left = torch.zeros_like(f), samples
    while left > 0:
        n = min(left, max(1, CHUNK // f.numel()))
        draws = torch.randn(n, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
        total += n * _mean_softmax(f, S, draws)
        left -= n
    return total / samples


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"laplace.predict: kind={kind!r}; it must be one of {', '.join(KINDS)}.")


def _mean_softmax(f: Tensor, S: Tensor, draws: Tensor) -> Tensor:
    """Mean over draws [n, samples or 1, classes] of softmax(f + L draw), L L^T = S + jitter."""
    eye = torch.eye(f.shape[1], dtype=f.dtype, device=f.device)
    L = torch.linalg.cholesky((S + S.mT) / 2 + JITTER * eye)
    return (f + torch.einsum("scd,nsd->nsc", L, draws.expand(-1, len(f), -1))).softmax(-1).mean(0)
