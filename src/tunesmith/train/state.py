"""What the loop works with, and what a step results in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from tunesmith.config import TrainConfig
from tunesmith.data.batches import BatchPlan, Counts, Sequences
from tunesmith.objectives.base import LOSS
from tunesmith.parallel.mesh import Mesh
from tunesmith.train.build import describe_choices
from tunesmith.train.checkpoint import Checkpointer
from tunesmith.train.learner import Learner
from tunesmith.train.meter import Meter
from tunesmith.train.worker import TrainJob, Worker


@dataclass(frozen=True)
class Training:
    """A training that is set up.

    Attributes:
        job: its settings hold what was chosen where the user's leave a choice.
        sequences_per_forward: of a microbatch, those that are run at once.
        drops_by_token: whether dropout follows from each token's row and place; that of older runs doesn't.
        validation: None where nothing is held out.
    """

    job: TrainJob
    worker: Worker
    learner: Learner
    optimizer: Optimizer
    checkpointer: Checkpointer
    sequences: Sequences
    sequences_per_forward: int
    drops_by_token: bool
    plan: BatchPlan
    num_steps: int
    validation: Sequences | None
    meter: Meter

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def model(self) -> nn.Module:
        return self.learner.policy.model

    @property
    def mesh(self) -> Mesh:
        return self.learner.mesh

    def describe(self) -> str:
        """Return in one line what was chosen for this run."""
        batch, policy, device = self.plan.global_batch, self.learner.policy, self.worker.device
        rows = "packed" if self.sequences.packing else "padded"
        return (
            f"{self.num_steps} steps ({self.plan.steps_per_epoch} an epoch) of {batch.microbatches} × "
            f"{batch.sequences_per_microbatch} {rows} sequences, {self.sequences_per_forward} at a time, "
            f"on {self.worker.world_size} × {device.type}; "
            f"{describe_choices(policy.model, policy.fused_loss, self.config, device)}"
        )


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, or the step that could not be taken because its loss or gradient isn't finite.

    Attributes:
        metrics: the objective's by name, `loss` among them.
        grad_norm: before clipping.
        counts: of the global batch.
    """

    metrics: dict[str, float]
    grad_norm: float
    counts: Counts
    stop_requested: bool

    @property
    def loss(self) -> float:
        return self.metrics[LOSS]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)
