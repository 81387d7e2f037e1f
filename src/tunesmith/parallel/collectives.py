"""Values that all ranks share: sums, decisions, objects."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def holds_on_all_ranks(condition: bool, device: torch.device) -> bool:
    """Return whether the condition holds on every rank: what follows from it must be the same on all. Collective."""
    holds = torch.tensor(int(condition), device=device)
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds.item())


def sum_over_ranks(values: list[float], group: dist.ProcessGroup) -> list[float]:
    """Return the sums of the values over all ranks, in float64. Collective; `group` works on the CPU."""
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals, group=group)
    return totals.tolist()


def broadcast_objects(values: list[Any], group: dist.ProcessGroup) -> list[Any]:
    """Return rank 0's values on every rank. Collective; they must pickle."""
    shared = list(values)
    dist.broadcast_object_list(shared, src=0, group=group)
    return shared
