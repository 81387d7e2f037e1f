"""The log-probs that the model gives to the trained tokens: what an objective is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.model.kernels.loss import sum_cross_entropy, token_cross_entropies


@dataclass(frozen=True)
class Policy:
    """A model as a `TokenLogProbs`; `fused_loss` says whether it never holds whole logits."""

    model: nn.Module
    fused_loss: bool

    def __call__(self, batch: Batch) -> Tensor:
        return -token_cross_entropies(self.model, batch, self.fused_loss)

    def sum(self, batch: Batch) -> Tensor:
        return -sum_cross_entropy(self.model, batch, self.fused_loss)
