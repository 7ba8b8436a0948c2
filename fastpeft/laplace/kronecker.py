"""One factor's posterior precision P = G (x) U + precision I, through the eigenvectors of G [p, p] and U [q, q].

Either may be known by its k largest eigenvalues alone; the others are then zero, and outside their eigenvectors P is the prior's.
Everything is fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpeft.terms import kron


class Gram:
    """sum of v v^T over the rows that are added: whole, or its `keep` largest eigenvalues of what came so far and each addition."""

    def __init__(self, size: int, keep: int | None, device: torch.device):
        self.keep = None if keep is None else min(keep, size)
        self.whole = torch.zeros(size, size if self.keep is None else 0, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """rows [vectors, size]"""
        rows = rows.double()
        if self.keep is None:
            self.whole.addmm_(rows.T, rows)
        else:
            top = eigen(torch.cat([self.whole, rows.T], 1), self.keep)
            self.whole = top.vectors * top.values.sqrt()

    def eigen(self, scale: float = 1.0) -> Eigen:
        """Those of scale times the sum."""
        if self.keep is None:
            values, vectors = torch.linalg.eigh(self.whole)
            return Eigen(values.clamp(min=0) * scale, vectors)
        top = eigen(self.whole, self.keep)
        return Eigen(top.values * scale, top.vectors)


@dataclass(frozen=True)
class Eigen:
    """values [k] >= 0 and orthonormal vectors [size, k] of a symmetric matrix."""

    values: Tensor
    vectors: Tensor

    @property
    def complete(self) -> bool:
        return self.vectors.shape[0] == self.vectors.shape[1]

    def matrix(self) -> Tensor:
        return (self.vectors * self.values) @ self.vectors.T


def eigen(X: Tensor, keep: int) -> Eigen:
    """The `keep` largest eigenvalues of X X^T, X [size, columns] (fewer where there are fewer columns), through the smaller side."""
    size, columns = X.shape
    Q, R = torch.linalg.qr(X) if columns < size else (None, X)
    values, vectors = torch.linalg.eigh(R @ R.T)
    values, vectors = values[-keep:].clamp(min=0), vectors[:, -keep:]
    return Eigen(values, vectors if Q is None else Q @ vectors)


@dataclass(frozen=True)
class Factor:
    """A trained factor mode [p, q] and the curvature G (x) U around it."""

    mode: Tensor
    G: Eigen
    U: Eigen

    @property
    def products(self) -> Tensor:
        """The eigenvalues of G (x) U that are known, [k, l]."""
        return self.G.values[:, None] * self.U.values

    def matrix(self, precision: Tensor) -> Tensor:
        """P, dense [p*q, p*q]; for small factors."""
        P = kron(self.G.matrix(), self.U.matrix())
        return P + precision * torch.eye(len(P), dtype=P.dtype, device=P.device)

    def logdet(self, precision: Tensor) -> Tensor:
        known = self.products
        rest = self.mode.numel() - known.numel()
        return (known + precision).log().sum() + rest * precision.log()

    def project(self, J: Tensor) -> Projected:
        """The Jacobian J [samples, classes, p, q] of the logits in this factor, as variances need it at any precision."""
        h = self.G.vectors.T @ J @ self.U.vectors
        if self.G.complete and self.U.complete:
            return Projected(h, None)
        outside = (J - self.G.vectors @ h @ self.U.vectors.T).flatten(2)
        return Projected(h, outside @ outside.mT)

    def covariance(self, seen: Projected, precision: Tensor) -> Tensor:
        """J P^-1 J^T: this factor's share of the logits' covariance, [samples, classes, classes]."""
        inside = _Inside.apply(seen.h, self.products, precision)
        return inside if seen.outside is None else inside + seen.outside / precision


class _Inside(torch.autograd.Function):
    """sum over k, l of h h^T / (products + precision), [samples, classes, classes], and its derivative in the precision alone.

    Autograd would keep two tensors of h's size for each, and read them several times.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, products: Tensor, precision: Tensor) -> Tensor:
        scaled = (h / (products + precision)).flatten(2)
        if ctx.needs_input_grad[2]:
            ctx.save_for_backward(scaled @ scaled.mT)
        return scaled @ h.flatten(2).mT

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        (squared,) = ctx.saved_tensors
        return None, None, -(grad * squared).sum()


@dataclass(frozen=True)
class Projected:
    """h [samples, classes, k, l]: J in the known eigenvectors.   outside [samples, classes, classes]: inner products of the rest."""

    h: Tensor
    outside: Tensor | None
