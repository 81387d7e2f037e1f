"""What turns batches into sums of loss and metrics: the same for training and validation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.data.batches import Batch, Counts, Sequences, empty_batch, microbatches_for_rank
from tunesmith.data.draws import Draws
from tunesmith.model.policy import Policy
from tunesmith.objectives.base import LossOutput, Objective
from tunesmith.parallel.mesh import Mesh


@dataclass(frozen=True)
class Learner:
    """The policy, what it is to learn, and this rank's place among the others."""

    policy: Policy
    objective: Objective
    mesh: Mesh
    device: torch.device

    def share(self, num_microbatches: int) -> list[int | None]:
        """Return the numbers of the microbatches that this rank runs; None where it runs an empty one."""
        return microbatches_for_rank(num_microbatches, self.mesh.data_rank, self.mesh.data_size)

    def collate(self, sequences: Sequences, rows: np.ndarray | None, draws: Draws | None = None) -> Batch:
        """Return this rank's part of the batch of these rows, or a batch without a trained token, on the device.

        `draws` give the keys of its dropout.
        """
        batch = empty_batch(sequences.pad_token_id) if rows is None else sequences.collate(rows, draws)
        return self.mesh.shard_sequence(batch).to(self.device)

    def loss(self, batch: Batch, counts: Counts) -> LossOutput:
        """Return what the batch adds to the sums of a global batch of these counts. Collective under FSDP."""
        return self.objective.loss(batch, counts, self.policy)

    def start_tally(self, counts: Counts) -> Tally:
        """Return the sums over no batch yet, of a global batch of these counts."""
        denominators = self.objective.denominators(counts)
        return Tally(denominators, {name: torch.zeros((), device=self.device) for name in denominators})


@dataclass(frozen=True)
class Tally:
    """This rank's share of an objective's sums, by name: float32 scalars on the model's device."""

    denominators: dict[str, int]
    sums: dict[str, Tensor]

    def add(self, output: LossOutput) -> None:
        for name, value in output.sums.items():
            self.sums[name] += value.detach()

    def divide(self, totals: list[float]) -> dict[str, float]:
        """Return the means by name, of sums over all ranks; NaN where there is nothing to divide by."""
        named = zip(self.denominators.items(), totals, strict=True)
        return {name: total / number if number else math.nan for (name, number), total in named}


def read_scalars(*scalars: Tensor) -> list[float]:
    """Return the values of scalars in one transfer, so that the host waits once for a GPU."""
    first = scalars[0]
    values: list[float] = torch.stack([scalar.to(first) for scalar in scalars]).tolist()
    return values
