"""Between the microbatches of a step FSDP keeps as much of the gradients as the plan says."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.gradients import CPU, open_sequences
from support.runs import small_config
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Batch, Sequences
from tunesmith.data.draws import Draws
from tunesmith.model.load import load_model_config
from tunesmith.model.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.mesh import build_mesh
from tunesmith.planning.layout import plan_layout
from tunesmith.planning.memory import build_planned_model
from tunesmith.train.build import build_model
from tunesmith.train.learner import Learner
from tunesmith.train.step import accumulate_gradients

MICROBATCHES = [np.array([row]) for row in range(4)]


def count_live_bytes() -> int:
    """Return the bytes of the floating-point tensors of this process."""
    found = [it for it in gc.get_objects() if issubclass(type(it), Tensor)]
    found += [it.grad for it in found if it.is_leaf and it.grad is not None]
    plain = [it.to_local() if hasattr(it, "to_local") else it for it in found]
    storages = [it.untyped_storage() for it in plain if it.is_floating_point()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class WatchedLearner(Learner):
    """Notes what lives before each of its microbatches."""

    noted: list[int] = field(default_factory=list)

    def collate(self, sequences: Sequences, rows: np.ndarray | None, draws: Draws | None = None) -> Batch:
        gc.collect()
        self.noted.append(count_live_bytes())
        return super().collate(sequences, rows, draws)


def keep_of_gradients(rank: int, world_size: int, config: TrainConfig, sequences: Sequences) -> int:
    mesh = build_mesh(rank, world_size)
    policy = Policy(build_model(config, CPU, mesh), fused_loss=False)
    learner = WatchedLearner(policy, SFT(), mesh, CPU)
    accumulate_gradients(learner, sequences, MICROBATCHES, 1, config.seed, 1)
    before, after = learner.noted
    return after - before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{"lora_rank": 32}, {"full_ft": True}], ids=str)
def test_as_much_of_the_gradients_is_kept_between_microbatches_as_planned(
    changes: dict[str, Any],
    dtype: str,
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    two_workers: WorkerGroup,
) -> None:
    changes = {"fsdp": "full_shard", "dtype": dtype, "per_device_train_batch_size": 1, **changes}
    config = small_config(model_of("llama"), rows, tmp_path, **changes)
    shape = load_model_config(config.model)
    planned = build_planned_model(config, shape, getattr(torch, dtype))
    _, memory = plan_layout(planned, config, "cpu", 2, 1 << 40)
    trained = 4 * sum(p.numel() for p in planned.model.parameters() if p.requires_grad)
    assert memory.gradients == pytest.approx(trained / 2 if config.full_ft else trained, rel=0.02)
    # The weights stay gathered until the step's last backward pass.
    gathered = sum(p.numel() for p in planned.model.parameters()) * planned.dtype.itemsize
    for kept in two_workers.run(keep_of_gradients, config, open_sequences(config, packing=False)):
        assert kept - gathered == pytest.approx(memory.gradients, rel=0.02)
    synced_at_once = config.model_copy(update={"gradient_accumulation_steps": 1})
    _, memory = plan_layout(planned, synced_at_once, "cpu", 2, 1 << 40)
    assert memory.gradients == pytest.approx(trained / 2, rel=0.02)
