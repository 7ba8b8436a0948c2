"""One call of each launcher on given inputs, in Triton and in torch, with the bytes and flops that it cannot
do without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.gpu.common import nbytes
from bench.gpu.operators import DROPS, SCALE, Inputs
from fastpeft.ops import lowrank, lowrank_triton
from fastpeft.ops.rownorm import row_sq_norm
from fastpeft.ops.rownorm_triton import row_sq_norm_forward


class Launch(NamedTuple):
    """triton, torch: calls that change nothing but what an operator writes in place.   bytes: each tensor
    once.
    """

    triton: Callable[[], Any]
    torch: Callable[[], Any]
    bytes: int
    flops: int


def launches(m: Inputs) -> dict[str, Launch]:
    """By operator; with dropout in the inputs only those that drop.

    torch's du_db_gain does not form dz and so moves less than the bytes given here.
    """
    t, i, o, n, r = m.case[:5]
    x, z, u, fa, fb = nbytes(m.x), nbytes(m.z), nbytes(m.u), nbytes(m.A), nbytes(m.B)
    low, high, blocks = 2 * t * i * r, 2 * t * o * r, m.case.blocks
    both = {"need_du": True, "need_db": True}
    every = {
        "down": _pair(lambda k: k.down(m.x, m.A, m.case.dtype, **m.how), x + fa + u, low),
        "up": _pair(lambda k: k.up(m.v, m.B, SCALE, blocks, m.bias), u + fb + z, high),
        "up_add": _pair(lambda k: k.up_add(m.z, m.v, m.B, SCALE, blocks), u + fb + 2 * z, high),
        "up_add_gain": _pair(
            lambda k: k.up_add_gain(m.z, m.v, m.B, SCALE, blocks, m.gain, m.bias), u + fb + 3 * z, high
        ),
        "du": _pair(
            lambda k: k.du_db(m.dz, None, m.B, SCALE, blocks, need_du=True, need_db=False), z + fb + u, high
        ),
        "du_db": _pair(
            lambda k: k.du_db(m.dz, m.v, m.B, SCALE, blocks, **both), z + 2 * fb + 2 * u, 2 * high
        ),
        "du_db_gain": _pair(
            lambda k: k.du_db_gain(m.dz, m.z, m.v, m.B, SCALE, blocks, m.gain, **both, need_dgain=True),
            3 * z + 2 * fb + 2 * u,
            2 * high,
        ),
        "dx": _pair(lambda k: k.dx(m.u, m.A, **m.how), u + fa + x, low),
        "dx_add": _pair(lambda k: k.dx_add(m.x, m.u, m.A, **m.how), u + fa + 2 * x, low),
        "da": _pair(lambda k: k.da(m.x, m.u, m.A, **m.how), x + u + fa, low),
    }
    if n == 1:
        every["row_sq_norm"] = Launch(
            lambda: row_sq_norm_forward(m.W, m.A, m.B), lambda: row_sq_norm(m.W, m.A, m.B),
            nbytes(m.W) + fa + fb, 2 * o * i * r,
        )  # fmt: skip
    return {name: launch for name, launch in every.items() if not m.case.p or name in DROPS}


def _pair(call: Callable[[Any], Any], count: int, flops: int) -> Launch:
    return Launch(lambda: call(lowrank_triton), lambda: call(lowrank), count, flops)
