"""Named axes: who takes which microbatches, who shares one, and how the weights lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor

from support.gradients import assert_close, gradient_of_step, open_sequences
from support.runs import small_config
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Batch, Sequences
from tunesmith.parallel.mesh import REPLICATE, SHARD, Mesh

MICROBATCHES = [np.array([0, 1]), np.array([2]), np.array([3])]


@pytest.mark.parametrize(
    ("axes", "data_ranks"),
    [
        ({SHARD: 4}, [0, 1, 2, 3]),
        ({REPLICATE: 2, SHARD: 2}, [0, 1, 2, 3]),
        ({SHARD: 2, "cp": 2}, [0, 0, 1, 1]),
        ({REPLICATE: 2, SHARD: 1, "cp": 2}, [0, 0, 1, 1]),
        ({"cp": 4}, [0, 0, 0, 0]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("alone")
def test_ranks_along_other_axes_share_a_data_rank(axes: dict[str, int], data_ranks: list[int]) -> None:
    meshes = [Mesh(axes, rank, dist.group.WORLD) for rank in range(4)]
    assert [mesh.data_rank for mesh in meshes] == data_ranks
    assert {mesh.data_size for mesh in meshes} == {len(set(data_ranks))}


@dataclass(frozen=True)
class HalvesTargets(Mesh):
    """Two ranks that share every batch: each trains every other of its targets."""

    def shard_sequence(self, batch: Batch) -> Batch:
        mine = slice(self.rank, None, 2)
        return replace(batch, positions_N=batch.positions_N[mine], targets_N=batch.targets_N[mine])


def differentiate(
    rank: int, world_size: int, kind: type[Mesh], axes: dict[str, int], config: TrainConfig, rows: Sequences
) -> dict[str, Tensor]:
    mesh = kind(axes, rank, dist.new_group(backend="gloo"))
    return gradient_of_step(config, rows, MICROBATCHES, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fsdp": "full_shard"}, {"full_ft": True}], ids=str)
@pytest.mark.parametrize(
    ("kind", "axes"),
    [(Mesh, {SHARD: 2}), (Mesh, {REPLICATE: 2, SHARD: 1}), (HalvesTargets, {SHARD: 1, "cp": 2})],
    ids=str,
)
@pytest.mark.usefixtures("alone")
def test_two_ranks_compute_what_one_does(
    kind: type[Mesh],
    axes: dict[str, int],
    changes: dict[str, Any],
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
    two_workers: WorkerGroup,
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path, lora_dropout=0, **changes)
    sequences = open_sequences(config, packing=True)
    expected = gradient_of_step(config, sequences, MICROBATCHES)
    for found in two_workers.run(differentiate, kind, axes, config, sequences):
        assert_close(found, expected)
