"""Where a rank stands among the others: which data it takes, with whom it adds up, what it holds of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tunesmith.compat import set_group_timeout
from tunesmith.parallel.collectives import sum_over_ranks
from tunesmith.parallel.nodes import explain_unequal, gather_places
from tunesmith.parallel.timeouts import GROUP_TIMEOUT

if TYPE_CHECKING:
    from tunesmith.data.batches import Batch

REPLICATE, SHARD = "dp_replicate", "dp_shard"


@dataclass(frozen=True)
class Mesh:
    """The ranks along named axes, the last of which varies fastest.

    Along `dp_replicate` and `dp_shard`, which come first, each rank takes microbatches of its own. Ranks that differ
    along other axes only share a data rank: they take the same microbatches, and each its part of every sequence.

    Attributes:
        axes: the ranks along each axis.
        rank: this one, in the whole group.
        group: all ranks; it works on the CPU, whatever the model's device: for values and decisions that all must share.
        unequal_nodes: why nodes are no axis, of several; None where they are, or there is one.
    """

    axes: Mapping[str, int]
    rank: int
    group: dist.ProcessGroup
    unequal_nodes: str | None = None

    @property
    def size(self) -> int:
        return math.prod(self.axes.values())

    @property
    def data_size(self) -> int:
        return self.axes.get(REPLICATE, 1) * self.axes.get(SHARD, 1)

    @property
    def num_nodes(self) -> int:
        """The nodes that weights may be replicated over."""
        return self.axes.get(REPLICATE, 1)

    @property
    def data_rank(self) -> int:
        return self.rank // (self.size // self.data_size)

    def shard_sequence(self, batch: Batch) -> Batch:
        """Return this rank's part of a batch that its data rank takes: all of it where nobody shares that rank."""
        return batch

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums of the values over all ranks, in float64. Collective."""
        return sum_over_ranks(values, self.group)

    def start_sum(self, tensor: Tensor) -> dist.Work:
        """Begin to add up a tensor on the model's device, in place, over all ranks. Collective."""
        work: dist.Work = dist.all_reduce(tensor, async_op=True)
        return work

    def lay_out_weights(self, device: torch.device, num_replicas: int) -> DeviceMesh:
        """Return the ranks as FSDP takes them: along the last axis they hold slices, along one before it the same.

        Those that share a data rank hold slices as all others do. Collective.
        """
        axes = {SHARD: self.size // num_replicas}
        if num_replicas > 1:
            axes = {REPLICATE: num_replicas, **axes}
        ranks = init_device_mesh(device.type, (*axes.values(),), mesh_dim_names=(*axes,))
        for group in ranks.get_all_groups():
            set_group_timeout(group, GROUP_TIMEOUT)
        return ranks


def build_mesh(rank: int, world_size: int) -> Mesh:
    """Return the mesh of a run: an axis of nodes, where several have equally many ranks, and one of the ranks of each.

    Collective.
    """
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    places = gather_places(rank, world_size, group)
    unequal = explain_unequal(places)
    num_nodes = 1 if unequal else world_size // places[0].num_local
    axes = {SHARD: world_size} if num_nodes == 1 else {REPLICATE: num_nodes, SHARD: world_size // num_nodes}
    return Mesh(axes, rank, group, unequal)
