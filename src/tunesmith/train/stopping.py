"""Early stopping by the validation loss."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStopping:
    """What the evaluations so far have shown; part of every checkpoint.

    Attributes:
        best_loss: the lowest validation loss so far, in nats, or None before the first.
        num_without_improvement: evaluations in a row that didn't fall by more than the threshold.
    """

    best_loss: float | None = None
    num_without_improvement: int = 0

    def observe(self, eval_loss: float, threshold: float) -> EarlyStopping:
        """Return the state after one more evaluation."""
        best_loss = math.inf if self.best_loss is None else self.best_loss
        if eval_loss < best_loss - threshold:
            return EarlyStopping(eval_loss, 0)
        # Written so that a NaN is no improvement and never becomes the best.
        best = eval_loss if eval_loss < best_loss else self.best_loss
        return EarlyStopping(best, self.num_without_improvement + 1)

    def renew(self) -> EarlyStopping:
        """Return the state with its whole patience again."""
        return EarlyStopping(self.best_loss, 0)

    def is_over(self, patience: int) -> bool:
        """Return whether to stop; a patience of 0 never stops."""
        return patience > 0 and self.num_without_improvement >= patience
