"""The k largest entries of a tensor, from counts of its bit patterns: no sort, and the same on every device.

The bit pattern of a float that is not negative, read as an integer, orders as the float does. One count of the upper 16
bits finds the bin in which the k-th largest lies, one of the lower 16 bits within that bin the value itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

# entries counted at a time: counting makes an integer copy of so many
PIECE = 1 << 24
_INFINITY = 0x7F800000


def largest(score: Tensor, k: int) -> Tensor:
    """Flat indices int64 [k], ascending, of the k largest entries of `score`: fp32 of any shape, no entry below +0.

    Of entries that equal the smallest one taken, those with the lowest flat index are taken; infinity ranks first.
    Raises TypeError for another dtype, ValueError for k outside 0 .. numel and for NaN or negative entries (-0.0 is one).
    """
    if score.dtype is not torch.float32:
        raise TypeError(f"largest: the score is {score.dtype}; its bit patterns are read as float32, so cast it.")
    if not 0 <= k <= score.numel():
        raise ValueError(f"largest: k={k} of {score.numel()} entries; it must be 0 to that number.")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=score.device)
    bits = score.detach().contiguous().view(torch.int32).flatten()
    if int(bits.amax()) > _INFINITY or int(bits.amin()) < 0:
        raise ValueError("largest: the score has NaN or negative entries, which have no place in this order.")
    upper, above = _bin_of(_count(bits, None), k)
    lower, between = _bin_of(_count(bits, upper), k - above)
    threshold = upper << 16 | lower
    taken = bits > threshold
    taken[(bits == threshold).nonzero().flatten()[: k - above - between]] = True
    return taken.nonzero().flatten()


def _count(bits: Tensor, upper: int | None) -> Tensor:
    """How often each value of the upper 16 bits occurs, or of the lower 16 where the upper ones are `upper`; on the CPU."""
    total = torch.zeros(1 << 16, dtype=torch.int64, device=bits.device)
    for piece in bits.split(PIECE):
        high = piece >> 16
        total += torch.bincount(high if upper is None else piece[high == upper] & 0xFFFF, minlength=1 << 16)
    return total.cpu()


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin in which the k-th largest lies (1 <= k <= sum of counts), and how many entries lie above that bin."""
    reached = counts.flip(0).cumsum(0)
    place = int((reached < k).sum())
    return len(counts) - 1 - place, int(reached[place - 1]) if place else 0
