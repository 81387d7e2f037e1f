"""Gradients of whole models are added up in buckets: the same sums, begun while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.gradients import gradient_of_step, open_sequences
from support.runs import small_config
from support.workers import WorkerGroup
from tunesmith.config import TrainConfig
from tunesmith.data.batches import Sequences
from tunesmith.parallel import replicate
from tunesmith.parallel.mesh import SHARD, Mesh
from tunesmith.parallel.replicate import GradientSum

# The second rank has one microbatch less than the first.
MICROBATCHES = [np.array([row]) for row in range(3)]


@dataclass(frozen=True)
class WatchedMesh(Mesh):
    """Notes how large the tensors are that it adds up."""

    noted: list[int] = field(default_factory=list)

    def start_sum(self, tensor: Tensor) -> dist.Work:
        self.noted.append(tensor.nbytes)
        return super().start_sum(tensor)


def differentiate(
    rank: int, world_size: int, config: TrainConfig, sequences: Sequences, bucket_bytes: int | None
) -> tuple[dict[str, Tensor], list[int]]:
    mesh = WatchedMesh({SHARD: world_size}, rank, dist.new_group(backend="gloo"))
    with pytest.MonkeyPatch.context() as patch:
        if bucket_bytes:
            patch.setitem(replicate._BUCKET_BYTES, "cpu", bucket_bytes)
        return gradient_of_step(config, sequences, MICROBATCHES, mesh=mesh), mesh.noted


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_buckets_hold_the_sums_of_all_at_once_to_the_bit(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path, two_workers: WorkerGroup
) -> None:
    config = small_config(model_of("llama"), rows, tmp_path, fsdp="no_shard")
    sequences = open_sequences(config, packing=False)
    whole, in_buckets = (
        two_workers.run(differentiate, config, sequences, bucket_bytes) for bucket_bytes in (None, 1000)
    )
    for (expected, (num_bytes,)), (found, buckets) in zip(whole, in_buckets, strict=True):
        assert sum(buckets) == num_bytes
        assert len(buckets) > 5
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def begun_in_backward(rank: int, world_size: int) -> list[int]:
    """Return how many buckets are on their way when each layer's backward pass begins."""
    mesh = WatchedMesh({SHARD: world_size}, rank, dist.new_group(backend="gloo"))
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    begun: list[int] = []
    for layer in model:
        layer.register_full_backward_pre_hook(lambda *_: begun.append(len(mesh.noted)))
    gradient_sum = GradientSum(model, mesh, bucket_bytes=model[0].weight.nbytes)
    gradient_sum.begin()
    model(torch.ones(1, 8)).sum().backward()
    gradient_sum.finish()
    return [*begun, len(mesh.noted)]


@pytest.mark.slow
def test_a_bucket_is_on_its_way_as_soon_as_it_is_whole(two_workers: WorkerGroup) -> None:
    assert two_workers.run(begun_in_backward) == [[0, 1, 2, 3, 4]] * 2
