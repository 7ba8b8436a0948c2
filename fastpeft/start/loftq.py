"""LoftQ: factors that make up for what quantisation loses (arXiv 2310.08659, algorithm 1)."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft.start.pissa import principal
from fastpeft.start.quantise import Quantise


def loftq(W: Tensor, rank: int, iterations: int, quantise: Quantise) -> tuple[Tensor, Tensor, nn.Module]:
    """A, B and the module of Q with Q + B A near W: Q = quantised(W - B A), (B, A) = principal(W - Q), from B A = 0, so many times.

    The last step is the SVD, so Q belongs to the B A of the round before.
    """
    left = W
    for _ in range(iterations):
        stored, Q = quantise(left)
        A, B = principal(W - Q, rank)
        left = W - B @ A
    return A, B, stored
