"""The dropout mask inside a kernel: the bits of fastpeft/ops/dropout.py.

Philox4x32 with 7 rounds, key: the 64-bit seed, counter: (column // 8, row, 0, 0). Its four words are eight 16-bit draws,
low half first; column i takes draw i % 8 and is kept iff the draw is at least `threshold` = round(p * 65536).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep(seed, rows, first, threshold, BT: tl.constexpr, BC: tl.constexpr, DTYPE: tl.constexpr):
    """1 where kept, 0 where dropped: [BT, BC] in DTYPE, for rows [BT] and the columns first .. first + BC - 1.

    seed: int64 scalar. first and BC: multiples of 8. One counter serves eight columns, so the words are made as
    [BT, BC / 8] and their draws are laid side by side: no draw is computed twice.
    """
    groups = first // 8 + tl.arange(0, BC // 8)
    c0 = tl.broadcast_to(groups.to(tl.uint32)[None, :], [BT, BC // 8])
    c1 = tl.broadcast_to(rows.to(tl.uint32)[:, None], [BT, BC // 8])
    zero = tl.zeros([BT, BC // 8], tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero, n_rounds=7)
    # join puts its two arguments on a new last axis, so bit 2 of the draw's number is joined first and bit 0 last
    even = tl.join(
        tl.join(_low(w0, threshold, DTYPE), _low(w2, threshold, DTYPE)),
        tl.join(_low(w1, threshold, DTYPE), _low(w3, threshold, DTYPE)),
    )
    odd = tl.join(
        tl.join(_high(w0, threshold, DTYPE), _high(w2, threshold, DTYPE)),
        tl.join(_high(w1, threshold, DTYPE), _high(w3, threshold, DTYPE)),
    )
    return tl.reshape(tl.join(even, odd), [BT, BC])


@triton.jit
def _low(word, threshold, DTYPE: tl.constexpr):
    return ((word & 0xFFFF).to(tl.int32) >= threshold).to(DTYPE)


@triton.jit
def _high(word, threshold, DTYPE: tl.constexpr):
    return ((word >> 16).to(tl.int32) >= threshold).to(DTYPE)
