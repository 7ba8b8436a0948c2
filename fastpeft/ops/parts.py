"""Terms that are differentiated whole: what stands for them in a plan, and how a changed base weight stands for some.

A family (kron, khatri_rao, dense, sparse, or their Triton namesakes) computes y += term(x), and from x and dz its share of
dx and the gradients of its tensors; it saves nothing. Some change the base weight for the time of one product instead: then
`change` gives the base that the product uses, dx comes from the same product, and only the gradients are left to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """ops: the family.   count: how many tensors it has.   scale: of the whole term.

    onto_y: whether it is added to y when all else is there, gain and bias too, because it adds in a wider dtype; all of a call are,
    or none, and the gain does not reach it.
    """

    ops: Any
    count: int
    scale: float
    onto_y: bool = False


def split(parts: Sequence[Part], tensors: Sequence[Any]) -> list[tuple[Part, Sequence[Any]]]:
    """Each part with its own of the tensors, which lie one after another."""
    found, at = [], 0
    for part in parts:
        found.append((part, tensors[at : at + part.count]))
        at += part.count
    return found


def changed(base: Any, shares: Sequence[tuple[Part, Sequence[Tensor]]]) -> contextlib.AbstractContextManager[Any]:
    """The base with every part that changes it; valid inside the block."""
    for part, _ in shares:
        if part.ops.ON_BASE:
            return _changed(base, shares)
    return contextlib.nullcontext(base)


@contextlib.contextmanager
def _changed(base: Any, shares: Sequence[tuple[Part, Sequence[Tensor]]]) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:
        for part, tensors in shares:
            if part.ops.ON_BASE:
                base = stack.enter_context(part.ops.change(base, tensors, part.scale))
        yield base
