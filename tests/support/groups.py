"""The process groups that a test has made, given back: each keeps a thread and sockets until its process ends."""

from __future__ import annotations

import torch.distributed as dist


def destroy_groups() -> None:
    """Destroy the groups of this process but for the one of all ranks."""
    if not dist.is_initialized():
        return
    for group in [*dist.distributed_c10d._world.pg_map]:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
