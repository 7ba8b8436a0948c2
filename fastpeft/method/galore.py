"""GaLore: W itself trains, by an optimiser that works on its gradient G projected to rank r; P is refreshed now and then.

    right: R = G P^T [out, r], P [r, in]      left: R = P^T G [r, in], P [out, r]      W <- W - lr scale N P (or P N), N from R

Between refreshes the layer is W plus a LowRank term with the projection as one factor and Z = 0 as the other: Z's gradient is R, G
is never formed, and with the right side x is not kept. An ordinary optimiser steps Z, and fastpeft.train.GaLoreProjection then moves
Z's step, times `scale`, into W and puts Z back to zero; training without it raises. It also refreshes P every `gap` steps from
the singular vectors of G (in fp32), which are collected for that one step. Moments stay as they are when P changes. proj_type "std": right where out >= in, else
left; "reverse_std" the other way; "left", "right", or "full": both, R = U^T G V^T [r, r]. A rank above the smaller side is that
side. All other parameters of the model train as they did. Before the first refresh P is the first unit vectors.

Paper: arXiv 2403.03507.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpeft.option_checks import check_finite, check_int
from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import Dense, LowRank, Term, collector

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


@method("galore", paper="arXiv 2403.03507")
class GaLore(Method):
    ROLES: ClassVar = {"Z": "step"}
    NOTES: ClassVar = Notes(
        formula="W <- W - lr scale back(N), N the optimiser's step on project(G); in the forward y = x W^T + b",
        defaults="galore-torch's README: rank 128, gap 200, scale 0.25, proj_type std",
        oracle="galore-torch 1.0 (AdamW, 8-bit AdamW, Adafactor): weights and moments step by step, over refreshes",
        deviations=(
            "The projections lie in the model and not in the optimiser's state, which holds what any optimiser holds of Z.",
            "Square weights are projected on the right, as in the code; the paper's text takes the left.",
            "On a 16-bit W projections and moments are fp32 and the step is rounded once, where the code keeps all of it in 16 bits.",
            "Clipping sees the projected gradient, whose norm is at most that of G.",
            "Weight decay comes after the step, as in galore-torch's AdamW; its Adafactor decays before it.",
        ),
    )
    PROCEDURE = "GaLoreProjection"
    TRAINS_ALL, writes_base = True, True
    right: Any
    left: Any

    def __init__(self, site: Site, *, rank: int = 128, gap: int = 200, scale: float = 0.25, proj_type: str = "std"):
        super().__init__()
        self.shape = out, size_in = site.out_features, site.in_features
        r = min(check_int("galore", "rank", rank, 1, None, site.name), *self.shape)
        self.gap = check_int("galore", "gap", gap, 1, None, site.name)
        self.scale = check_finite("galore", "scale", scale)
        if proj_type not in PROJ_TYPES:
            raise ValueError(f"galore: proj_type={proj_type!r} at {site.name!r}; it must be one of {', '.join(PROJ_TYPES)}.")
        tall = (out >= size_in) == (proj_type == "std")
        right, left = {"left": (False, True), "right": (True, False), "full": (True, True)}.get(proj_type, (tall, not tall))
        unit = functools.partial(torch.eye, dtype=site.dtype, device=site.device)
        self.register_buffer("right", unit(r, size_in) if right else None)
        self.register_buffer("left", unit(out, r) if left else None)
        self.Z = site.zeros(r if left else out, r if right else size_in)
        self.leaf: Tensor | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with B A = back(Z)."""
        if self.left is None:
            return self.right, self.Z
        if self.right is None:
            return self.Z, self.left
        # in a step that refreshes, left is written before the product's own backward
        return self.right, (self.left if self.leaf is None else self.left.clone()) @ self.Z

    @torch.no_grad()
    def refresh(self, G: Tensor) -> None:
        """The projections from the singular vectors of G [out, in], in place."""
        U, _, V = torch.linalg.svd(G.float(), full_matrices=False)
        if self.right is not None:
            self.right.copy_(V[: len(self.right)])
        if self.left is not None:
            self.left.copy_(U[:, : self.left.shape[1]])

    @torch.no_grad()
    def project(self, G: Tensor) -> Tensor:
        """R, in Z's shape and dtype."""
        R = G.to(self.Z.dtype)
        R = R if self.left is None else self.left.T @ R
        return R if self.right is None else R @ self.right.T

    @torch.no_grad()
    def fold(self, W: Tensor, decay: float) -> None:
        """W [out, in] += scale * back(Z), then W -= decay * W; Z = 0."""
        A, B = self.factors()
        wide = W if W.dtype is A.dtype else W.to(A.dtype)
        wide.addmm_(B, A, alpha=self.scale)
        if decay:
            wide.add_(wide, alpha=-decay)
        if wide is not W:
            W.copy_(wide)
        self.Z.zero_()

    @property
    def untouched(self) -> bool:
        """Whether no refresh was yet."""
        P = self.right if self.left is None else self.left
        return torch.equal(P, torch.eye(*P.shape, dtype=P.dtype, device=P.device))

    def collect(self, take: Callable[[Tensor], None] | None) -> None:
        """From the next training forward on, backward gives G [out, in] to `take`, which may keep it; None ends that."""
        self.leaf = None if take is None else collector(self.Z, self.shape, take)

    def terms(self, base: Any) -> list[Term]:
        self.need_procedure("galore")
        found: list[Term] = [LowRank(*self.factors())]
        return found if self.leaf is None or not self.training else [*found, Dense(self.leaf)]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"leaf": None}
