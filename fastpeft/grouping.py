"""When the experts of a layer are grouped: a Grouped term, which computes a token's own experts, beside a LowRank of all of them.

All of them is the quicker one up to some total rank, where the zeros cost less than sorting the tokens. That rank is measured
(python -m bench.experts), never guessed: without an entry for its device and dtype a layer computes all of them. No GPU has been
measured, so there is none for "cuda"; nor does the table hold another entry than those that its rows name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Limit(NamedTuple):
    """Grouped is quicker from `total` ranks of all experts on, where a token uses at most `active` of them; `source`: the rows that
    say so, a file of bench/results.
    """

    active: int
    total: int
    source: str


# by device type and dtype of the base weight
LIMITS: dict[tuple[str, torch.dtype], tuple[Limit, ...]] = {
    ("cpu", torch.float32): (Limit(active=32, total=1024, source="experts.jsonl"),),
    ("cpu", torch.bfloat16): (Limit(active=32, total=512, source="experts.jsonl"),),
}


def groups(ranks: Sequence[int], k: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether experts of these ranks, of which a token uses k, are past a limit of the table; never while torch.compile traces.

    (Traced code has no order of the tokens by expert, which depends on the data.)
    """
    if not LIMITS or torch.compiler.is_compiling():
        return False
    active, total = sum(sorted(ranks)[-k:]), sum(ranks)
    return any([active <= limit.active and total >= limit.total for limit in LIMITS.get((device.type, dtype), ())])
