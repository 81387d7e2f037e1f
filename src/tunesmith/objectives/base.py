"""The seam between the loop and what it minimizes.

Shapes: N trained tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.data.batches import Batch, Counts

LOSS = "loss"


class TokenLogProbs(Protocol):
    """The policy: the log-probs that the model gives to a batch's targets, in nats, float32.

    Either call is one forward pass. Collective under FSDP: every rank must run equally many.
    """

    def __call__(self, batch: Batch) -> Tensor:
        """Return the log-prob of each target, of shape (N,)."""

    def sum(self, batch: Batch) -> Tensor:
        """Return their sum, a scalar; it takes less time and memory than to add up the log-probs of each."""


@dataclass(frozen=True)
class LossOutput:
    """What a batch adds to the loss and the metrics of its global batch; scalars on the model's device.

    Attributes:
        loss_sum: the batch's share of the loss, not yet divided. Gradients flow from it.
        metric_sums: the same of what else is shown, by name.
    """

    loss_sum: Tensor
    metric_sums: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def sums(self) -> dict[str, Tensor]:
        return {LOSS: self.loss_sum, **self.metric_sums}


class Objective(Protocol):
    """What a training minimizes; the same for training and validation. It must pickle: every worker gets one."""

    def denominators(self, counts: Counts) -> dict[str, int]:
        """Return what the sums of a whole global batch are divided by: that of `loss`, and of each metric by its name.

        They follow from the data alone, so that they are known before the first forward pass. A metric named here is
        in every line of metrics, as `eval_…` in those of evaluations.
        """

    def loss(self, batch: Batch, counts: Counts, policy: TokenLogProbs) -> LossOutput:
        """Return a batch's share of the sums; of a batch without targets, zeros that gradients flow from.

        Args:
            batch: a part of the global batch that this rank runs.
            counts: of the whole global batch, for terms that are divided by different numbers.
            policy: to be called once, whatever the batch: other ranks wait in it.
        """
