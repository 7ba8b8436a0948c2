"""A fixed random projection that stores nothing: P = H' diag(g) Pi H diag(b), Fastfood (Le, Sarlos, Smola, 2013).

H is the Walsh-Hadamard matrix of order n = 2^q over sqrt(n), in Sylvester's order, and H' its first rows; b signs, Pi a permutation,
g normal. Everything random is made anew from a 64-bit key in each call, by the counter-based generator of the dropout, so that
every device draws the same signs and the same permutation, and the same g up to the rounding of its logarithm and cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpeft.ops.dropout import philox

_MASK32 = 0xFFFFFFFF
# the order of the Hadamard matrix that one product applies: 16 additions in place of 4 passes over the vector
RADIX = 16


def words(key: int, count: int, stream: int, device: torch.device) -> list[Tensor]:
    """Four random words of 32 bits, int64 [count] each, at the counters (i, stream)."""
    i = torch.arange(count, device=device)
    zero = torch.zeros_like(i)
    return philox((i & _MASK32, i >> 32, zero + stream, zero), (key & _MASK32, (key >> 32) & _MASK32))


def permutation(key: int, count: int, stream: int, device: torch.device) -> Tensor:
    """int64 [count]: the order of as many random numbers of 63 bits."""
    high, low, *_ = words(key, count, stream, device)
    return torch.argsort(((high >> 1) << 32) | low, stable=True)


def draws(key: int, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """b [n] of +-1, Pi as int64 [n], g [n] normal(0, 1), b and g in fp64."""
    signs, first, second, _ = words(key, n, 0, device)
    radius = torch.sqrt(-2 * torch.log((first + 1).double() / 2**32))
    g = radius * torch.cos(second.double() * (2 * math.pi / 2**32))
    return (1 - 2 * (signs & 1)).double(), permutation(key, n, 1, device), g


def project(z: Tensor, length: int, key: int) -> Tensor:
    """P z, [length]; z [m] with m <= length. n is the power of two that is `length` or the next above."""
    n = 1 << (length - 1).bit_length()
    b, order, g = draws(key, n, z.device)
    padded = torch.nn.functional.pad(z, (0, n - z.shape[0])) * b.to(z.dtype)
    return walsh_hadamard(walsh_hadamard(padded)[order] * g.to(z.dtype))[:length]


def walsh_hadamard(z: Tensor) -> Tensor:
    """H z for z [2^q]; H H = 1."""
    n, done = z.shape[0], 1
    while done < n:
        radix = min(RADIX, n // done)
        z = torch.matmul(_hadamard(radix, z), z.view(-1, radix, done)).view(n)
        done *= radix
    return z * n**-0.5


def _hadamard(n: int, like: Tensor) -> Tensor:
    """The Hadamard matrix [n, n] of +-1 in Sylvester's order, n a power of two."""
    H = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    for _ in range(n.bit_length() - 1):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H
