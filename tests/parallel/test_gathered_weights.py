"""Weights that stay gathered between a forward and its backward pass do so for all microbatches of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.gradients import CPU, open_sequences
from support.runs import small_config
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.model.policy import Policy
from tunesmith.objectives.sft import SFT
from tunesmith.parallel.mesh import build_mesh
from tunesmith.train.build import build_model
from tunesmith.train.learner import Learner
from tunesmith.train.step import accumulate_gradients


class CountsGathers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.c10d._allgather_base_.default
        return func(*args, **(kwargs or {}))


def count_gathers(rank: int, world_size: int, config: TrainConfig, sequences: Sequences) -> tuple[int, int]:
    """Return how often weights are gathered in a step, and the bytes of those that still are after it."""
    mesh = build_mesh(rank, world_size)
    model = build_model(config, CPU, mesh)
    learner = Learner(Policy(model, fused_loss=False), SFT(), mesh, CPU)
    microbatches = [np.array([row]) for row in range(6)]
    with CountsGathers() as gathers:
        accumulate_gradients(learner, sequences, microbatches, 1, config.seed, 1)
    return gathers.count, sum(not hasattr(p, "to_local") for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("full_ft", [False, True])
@pytest.mark.parametrize("stay", [False, True])
def test_weights_that_stay_are_gathered_once_a_step(
    stay: bool,
    full_ft: bool,
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    two_workers: WorkerGroup,
) -> None:
    # Those of an offloaded run go after each forward pass, but for the outermost.
    config = small_config(
        model_of("llama"), rows, tmp_path, fsdp="full_shard", full_ft=full_ft, cpu_offload=not stay
    )
    num_blocks, num_microbatches = 2, 3
    expected = num_blocks * (1 if stay else 2 * num_microbatches) + 1
    sequences = open_sequences(config, packing=False)
    assert two_workers.run(count_gathers, config, sequences) == [(expected, 0)] * 2
