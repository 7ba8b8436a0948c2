"""What the two compile-gate tests share; the gate itself is bench/gate.py."""

from __future__ import annotations

import re

from bench import gate

ARCHES = {target: "hip" if target == "gfx942" else target for target in gate.TARGETS}


def assert_builds(family: str, ranks, target: str) -> None:
    """Every build is free of faults, and every kernel of the family is among them."""
    table = gate.rows(family, ranks, [target])
    bad = [r for r in table if r.faults()]
    assert not bad, "\n" + gate.markdown(bad)
    module = getattr(gate, family)
    assert {k.fn.__name__ for k in module.KERNELS} <= {r.kernel for r in table}


def built_tiles(family: str, kernel: str, target: str) -> set:
    """The tiles with which the gate's cases launch `kernel`, over all ranks."""
    found = set()
    for r in gate.EVERY:
        for case in gate.CASES[family](r).values():
            for launch in gate.launches(case, target):
                if launch.kernel.fn.__name__ == f"{kernel}_kernel":
                    a = launch.arguments
                    size = (a["BO"], a["BI"]) if kernel == "norm" else (a["BT"], a["BC"])
                    stages = launch.options["num_stages"]
                    found.add(gate.tiles.Tile(*size, a["BR"], launch.options["num_warps"], stages))
    return found


def narrow_offsets(ttir: str) -> list[str]:
    """Pointer arithmetic on tiles whose offset has 32 bits, and 32-bit products of tiles, in Triton's IR."""
    adds = re.findall(r"tt\.addptr .*tensor<\d+x\d+x!tt\.ptr<\w+>>, tensor<\d+x\d+xi32>", ttir)
    return adds + re.findall(r"arith\.muli .*tensor<\d+x(?:\d+x)?i32>", ttir)
