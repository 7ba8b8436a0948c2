"""LISA: W itself trains, most blocks frozen at any time; y = x W^T + b, and nothing is added to it.

adapt leaves every parameter of the model as trainable as it was, the optimiser must hold them all, and
fastpeft.train.LISASchedule freezes from the start of training on: embeddings, head and what else lies outside of the blocks always
train, of the blocks a few, drawn anew every so many steps. Training without it raises. A frozen layer keeps no input for backward.
unload and adapters_off need the values from before (keep_base=True, a copy on the CPU); merge keeps the trained ones; a saved
adapter is the full model. Layers named in target_modules say which blocks there are; it does not restrict what trains.

Paper: arXiv 2403.17919.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fastpeft.registry import Method, Notes, Site, method
from fastpeft.terms import Term


@method("lisa", paper="arXiv 2403.17919")
class LISA(Method):
    NOTES: ClassVar = Notes(
        formula="y = x W^T + b, W trains while its block is drawn",
        defaults="the procedure's: 2 blocks every 20 steps, as in LMFlow",
        oracle="torch AdamW over the active parameters, made anew as each state policy says; full AdamW where every block is drawn",
        deviations=(
            "An optimiser's state of blocks that leave is dropped by default (LMFlow keeps it, the paper's runs dropped all of it).",
            "Blocks are drawn by a generator seeded with (seed, interval), where LMFlow takes NumPy's global one: ranks and resumes agree.",
            "The final norm and whatever else lies outside of the blocks trains, as in LMFlow; the paper names embeddings and head only "
            "(final_norm=False).",
        ),
    )
    PROCEDURE = "LISASchedule"
    TRAINS_ALL = True

    def __init__(self, site: Site):
        super().__init__()

    def terms(self, base: Any) -> list[Term]:
        self.need_procedure("lisa")
        return []
