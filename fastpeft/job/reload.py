"""Does the saved adapter give the trained model again? In a fresh model, through fastpeft and through stock
PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpeft.job.arms import Arm, peft_counterpart
from fastpeft.job.evaluate import logits
from fastpeft.job.outcome import Reload
from fastpeft.job.state import Job


def check_reload(job: Job, arm: Arm, seed: int) -> Reload:
    """Reload the adapter folder into fresh models whose new head starts from another seed than the trained
    one's."""
    import fastpeft

    size = min(len(job.held), 2 * job.settings.batch_size)
    batch = job.held.batch(list(range(size)))
    expected = logits(arm.model, batch, job.settings)

    fresh, _ = job.load(seed + 1)
    fastpeft.load_adapter(fresh, job.adapter_folder)
    ours = logits(fresh, batch, job.settings)

    theirs = None
    if job.settings.compare and peft_counterpart(job.settings.method, job.settings.options):
        theirs = _through_peft(job.load(seed + 1)[0], job.adapter_folder)
        theirs = float((logits(theirs, batch, job.settings) - expected).abs().max())
    return Reload(float((ours - expected).abs().max()), theirs, float(expected.abs().max()))


def _through_peft(model: Any, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(model, str(folder))
