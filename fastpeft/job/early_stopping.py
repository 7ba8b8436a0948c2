"""Early stopping: when one arm stops learning, and which epoch's weights it ends with.

The rule is that of Keras and of Transformers' EarlyStoppingCallback. It looks at the loss on examples held out
of the training data for this alone (fastpeft.job.validation), never at the evaluation examples: a figure that
chose the epoch could not also be reported as what the epoch is worth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class EarlyStopping:
    """patience: evaluations in a row without an improvement after which an arm stops, at least 1.

    min_delta: how far below the best loss so far a loss must lie to count as an improvement, in the loss's own
    unit (nats per example, or per predicted token).   losses: validation loss after each epoch.
    best: the loss of `best_epoch`, the last epoch that improved (1 is the first; 0 before any did).
    """

    patience: int
    min_delta: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: float = math.inf
    best_epoch: int = 0

    def update(self, loss: float) -> bool:
        """Take in the loss after one more epoch; True if it is an improvement. The first epoch always is one,
        a NaN never after it."""
        self.losses.append(loss)
        improved = not self.best_epoch or loss < self.best - self.min_delta
        if improved:
            self.best, self.best_epoch = loss if not math.isnan(loss) else math.inf, len(self.losses)
        return improved

    @property
    def stopped(self) -> bool:
        return len(self.losses) - self.best_epoch >= self.patience
