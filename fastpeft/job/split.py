"""A seeded, stratified split that never puts copies of one text on both sides."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

SHINGLE_WORDS = 3
NEAR_COPY = 0.5


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Every run of SHINGLE_WORDS lower-case words; a shorter text is one shingle."""
    words = re.findall(r"\w+", text.lower())
    n = min(SHINGLE_WORDS, len(words))
    return frozenset(tuple(words[k : k + n]) for k in range(len(words) - n + 1)) if words else frozenset()


def near_copies(texts: Sequence[str], *, threshold: float = NEAR_COPY) -> list[int]:
    """A group number per text: texts whose shingle sets have a Jaccard index of at least `threshold` share
    one.

    Groups are transitive (a ~ b and b ~ c puts all three together). Only texts with a common shingle are
    compared.
    """
    sets = [shingles(t) for t in texts]
    parent = list(range(len(texts)))

    def find(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    holders: dict[Hashable, list[int]] = defaultdict(list)
    for k, own in enumerate(sets):
        common = Counter(j for shingle in own for j in holders[shingle])
        for j, both in common.items():
            if both >= threshold * (len(own) + len(sets[j]) - both):
                parent[find(k)] = find(j)
        for shingle in own:
            holders[shingle].append(k)
    return [find(k) for k in range(len(texts))]


def same_text(texts: Sequence[str]) -> list[int]:
    """A group number per text: texts that differ at most in case and white space share one."""
    first: dict[str, int] = {}
    return [first.setdefault(" ".join(t.lower().split()), k) for k, t in enumerate(texts)]


def split(
    groups: Sequence[int], strata: Sequence[Hashable], *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the training and the held-out side; a group is never divided.

    groups: group number per example.   strata: its class.   share: of each class that is held out, rounded;
    at least one example of a class stays in training. Groups are dealt in an order drawn from `seed` to the
    held-out side while every class in them has room there, so a class may fall short of its share by less
    than its largest group.
    """
    sizes = Counter(strata)
    room = {c: min(max(1, round(share * n)), n - 1) for c, n in sizes.items()}
    members: dict[int, list[int]] = defaultdict(list)
    for k, g in enumerate(groups):
        members[g].append(k)
    order = sorted(members)
    random.Random(seed).shuffle(order)
    held: list[int] = []
    for g in order:
        need = Counter(strata[k] for k in members[g])
        if all(room[c] >= n for c, n in need.items()):
            room = {c: r - need[c] for c, r in room.items()}
            held += members[g]
    chosen = set(held)
    return [k for k in range(len(groups)) if k not in chosen], sorted(held)
