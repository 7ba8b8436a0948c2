"""Which recipes are measured on the main job, with which options, and what is to be known of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastpeft.job.arms import FASTPEFT, FROZEN, PEFT
from fastpeft.job.errors import JobError
from fastpeft.registry import every_recipe, get_recipe

# title -> (method, options): yardsticks that no recipe's default is, and what a weak default needs to be told apart from a defect
YARDSTICKS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora rank 1": ("lora", {"rank": 1}),
    "lotr rank 32": ("lotr", {"rank": 32}),
    "lotr svd": ("lotr", {"left": "svd", "right": "svd"}),
}
# what a default made for billions of parameters needs on an encoder of 384 dimensions
OPTIONS: dict[str, dict[str, Any]] = {
    # the published density trains 443 numbers in a 384 x 384 layer, and the schedule's 64 steps are a third of the main job's
    "rosa": {"density": 0.01},
}
# what one training run cannot do
LEFT_OUT = {
    "phatgoose": "needs trained experts and a gate trained for each before it routes, and then trains nothing; `python -m bench.routed` measures it",
}
NOTES = {
    "bilora": "learns in two levels: the examples of the upper one are held out of the training data",
    "laplace": "trained, it is `lora`; its posterior is fitted afterwards (`fastpeft laplace`) and moves no accuracy",
    "moa": "begins fresh experts and trains their routers on the domains of the texts, which no other recipe is told; each class is of one "
    "domain here, so in training the domain gives most of the answer away, and a text that is then sent to another expert is lost; "
    "`python -m bench.routed` has domains that share their classes",
    "o_lora": "has one task here, so there are no earlier adapters to be orthogonal to (`fastpeft sequence` has several)",
    "galore": "trains the model's own weights; there is no adapter to save, the file holds what changed",
    "lisa": "trains the model's own weights; there is no adapter to save, the file holds what changed",
}


@dataclass(frozen=True)
class Entry:
    """A row. arm: FASTPEFT, or one of the two arms that every recipe is measured beside.   left_out: why it is not run."""

    title: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arm: str = FASTPEFT

    @property
    def routed(self) -> bool:
        """Whether its data must say the domains of the texts."""
        return self.arm == FASTPEFT and get_recipe(self.method).cls.ROUTED

    @property
    def left_out(self) -> str | None:
        return LEFT_OUT.get(self.method) if self.arm == FASTPEFT else None

    @property
    def note(self) -> str | None:
        return NOTES.get(self.method) if self.arm == FASTPEFT else None


# the rows without which no other can be read
BESIDE = (Entry("frozen", "lora", arm=FROZEN), Entry("PEFT lora", "lora", arm=PEFT))


def entries(titles: Sequence[str] | None = None) -> dict[str, Entry]:
    """Title -> entry, of fastpeft's; every recipe and yardstick, or those named. JobError for a title that does not exist."""
    every = {t: Entry(t, method, options) for t, (method, options) in YARDSTICKS.items()}
    every |= {r.name: Entry(r.name, r.name, OPTIONS.get(r.name, {})) for r in every_recipe()}
    unknown = sorted(set(titles or ()) - every.keys())
    if unknown:
        raise JobError(f"compare: --recipes {', '.join(unknown)}: there is no such recipe; there are {', '.join(every)}.")
    return {t: e for t, e in every.items() if titles is None or t in titles}
