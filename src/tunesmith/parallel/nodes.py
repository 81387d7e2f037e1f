"""Which ranks share a node, as torchrun and Ray Train tell each process in its environment."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import astuple, dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Place:
    """Where a rank stands: on which node, as which of the ranks there, and of how many."""

    node: int
    local_rank: int
    num_local: int


def find_place(rank: int, world_size: int) -> Place:
    """Return the place of this process; where its environment doesn't say, all ranks share one node."""
    num_local = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    # torchrun's name, then Ray Train's.
    node = os.environ.get("GROUP_RANK") or os.environ.get("NODE_RANK")
    return Place(
        node=int(node) if node else rank // num_local,
        local_rank=int(os.environ.get("LOCAL_RANK", rank % num_local)),
        num_local=num_local,
    )


def gather_places(rank: int, world_size: int, group: dist.ProcessGroup) -> list[Place]:
    """Return the place of each rank. Collective; `group` works on the CPU."""
    found: list[tuple[int, int, int]] = [(0, 0, 0)] * world_size
    dist.all_gather_object(found, astuple(find_place(rank, world_size)), group)
    return [Place(*place) for place in found]


def explain_unequal(places: list[Place]) -> str | None:
    """Return why the ranks can't be laid out as a table with a row for each node, or None if they can."""
    num_local = places[0].num_local
    if {place.num_local for place in places} != {num_local} or len(places) % num_local:
        counts = Counter(place.node for place in places)
        return f"the nodes have {', '.join(str(counts[node]) for node in sorted(counts))} workers"
    in_order = [Place(rank // num_local, rank % num_local, num_local) for rank in range(len(places))]
    return None if places == in_order else "the workers of a node don't have consecutive ranks"
