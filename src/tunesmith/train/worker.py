"""The seam between the training loop and whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tunesmith.config import TrainConfig
from tunesmith.objectives.base import Objective
from tunesmith.objectives.sft import SFT
from tunesmith.runs.folder import RunDir

if TYPE_CHECKING:
    import torch

    from tunesmith.model.frozen_weights import FrozenWeight


class Worker(Protocol):
    """One training process of a group. torch's default process group exists already."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """Tell the runner of a new checkpoint. Collective: every rank must call it."""

    def resume_from(self) -> Path | None:
        """Return the checkpoint folder to go on from, or None to start at step 0."""


@dataclass
class ProcessWorker:
    """A plain process: tests, profilers, `torchrun`. Resumes from the run folder's latest checkpoint."""

    rank: int
    world_size: int
    device: torch.device
    run: RunDir

    def report(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """There is nobody to tell."""

    def resume_from(self) -> Path | None:
        latest = self.run.latest_checkpoint()
        return latest.path if latest else None


@dataclass(frozen=True)
class TrainJob:
    """What every worker of a run is given."""

    config: TrainConfig
    run: RunDir
    prepared_path: Path
    num_threads: int | None = None
    """CPU threads of this worker; None leaves torch's choice."""
    lease_token: str | None = None
    """The driver's lease: a worker whose driver was replaced publishes nothing. None: no lease."""
    objective: Objective = field(default_factory=SFT)
    """What the training minimizes."""
    frozen_weight: type[FrozenWeight] | None = None
    """How frozen weights are stored; None: as the model has them."""
