"""Supervised fine-tuning: the cross-entropy of the trained tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.objectives.base import LOSS, LossOutput, TokenLogProbs

if TYPE_CHECKING:
    from tunesmith.data.batches import Batch, Counts


@dataclass(frozen=True)
class SFT:
    """The mean cross-entropy per trained token, in nats."""

    def denominators(self, counts: Counts) -> dict[str, int]:
        return {LOSS: counts.trained_tokens}

    def loss(self, batch: Batch, counts: Counts, policy: TokenLogProbs) -> LossOutput:
        return LossOutput(-policy.sum(batch))
