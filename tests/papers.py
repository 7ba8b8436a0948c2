"""The oracles: each method's formula from its paper, slow and dense, with the dropout mask as an argument.

Nothing here calls fastpeft. W [out, in]  x [..., in]  A [r, in]  B [out, r]; a mask has x's shape, holds 0 or 1 / (1 - p), and
None means no dropout. Gradients come from ordinary autograd.
"""

from __future__ import annotations

import torch


def masked(x, mask):
    return x if mask is None else x * mask


def linear(x, W, b=None):
    y = torch.einsum("...i,oi->...o", x, W)
    return y if b is None else y + b


def lora(x, W, b, A, B, s, mask=None):
    """arXiv 2106.09685, equation 3, with dropout on what A reads."""
    return linear(x, W, b) + s * linear(linear(masked(x, mask), A), B)


def dora_weight(W, A, B, m, s, full=False):
    """arXiv 2402.09353, equation 5; without `full` the norm is a constant in backward (section 4.3)."""
    V = W + s * (B @ A)
    norm = torch.sqrt((V * V).sum(dim=1, keepdim=True))
    return m[:, None] * V / (norm if full else norm.detach())


def dora(x, W, b, A, B, m, s, mask=None, full=False):
    """y = x W^T + b + drop(x) (W' - W)^T: without a mask x W'^T + b; with one, the law of the authors' code."""
    return linear(x, W, b) + linear(masked(x, mask), dora_weight(W, A, B, m, s, full) - W)


def low_rank(x, A, B, s=1.0, mask=None, mid=None, rows=None, post=None, blocks=1):
    """s * post(mid(drop(x) A^T, x rows^T, x) B^T), block-diagonal with A [n, r, in/n] and B [n, out/n, r]."""
    if blocks > 1:
        parts = [linear(linear(c, a), b) for c, a, b in zip(masked(x, mask).chunk(blocks, -1), A, B, strict=True)]
        return s * torch.cat(parts, -1)
    u = linear(masked(x, mask), A)
    if mid is not None:
        u = mid(u, None if rows is None else linear(x, rows), x)
    z = linear(u, B)
    return s * (z if post is None else post(z))


def site(x, W, b, added=(), gain=None, gain_mask=None, biases=()):
    """y = x W^T + (g - 1) (drop(x) W^T) + g * sum(added) + b + sum(biases); `added` are outputs of low_rank."""
    base = linear(x, W)
    total = sum(added) if added else torch.zeros_like(base)
    y = base + total if gain is None else base + (gain - 1) * linear(masked(x, gain_mask), W) + gain * total
    for v in ([] if b is None else [b]) + list(biases):
        y = y + v
    return y
