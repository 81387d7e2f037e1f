"""How a run lies in its workers' memory, where the settings leave it open: the fastest way that fits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from tunesmith.config import TrainConfig
from tunesmith.errors import ModelError
from tunesmith.machine import available_memory
from tunesmith.model.files.weight_names import find_stacked
from tunesmith.parallel.activation_checkpointing import find_decoder_blocks
from tunesmith.parallel.fsdp import HYBRID
from tunesmith.planning.memory import (
    PROCESS_BYTES,
    Layout,
    Memory,
    PlannedModel,
    estimate_memory,
    estimate_microbatch,
    keeps_squares,
    stored_bytes,
)

logger = logging.getLogger(__name__)

# Of a worker's memory: what whole weights may fill, and what a run may where it has the choice. The rest is for
# what can't be told: the plan is unmeasured on GPUs, and their allocator keeps gaps.
SHARE_FOR_WEIGHTS = 0.5
SHARE_FOR_ALL = 0.8


def find_room(device: torch.device, world_size: int) -> int:
    """Return the bytes of memory that each worker may fill: as many as the smallest of them has. Collective."""
    if device.type == "cuda":
        found = _room_on_gpu(device)
    else:
        # torchrun's name, which Ray Train sets too.
        found = available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    room = torch.tensor(found, device=device)
    dist.all_reduce(room, dist.ReduceOp.MIN)
    return int(room.item())


def _room_on_gpu(device: torch.device) -> int:
    """Return what is free or ours: the allocator's blocks, and the CUDA context, which a plan counts as well."""
    free, total = torch.cuda.mem_get_info(device)
    return min(total, free + torch.cuda.memory_reserved(device) + PROCESS_BYTES["cuda"])


def choose_layout(
    planned: PlannedModel,
    config: TrainConfig,
    device_type: str,
    num_workers: int,
    room: int,
    num_nodes: int = 1,
) -> Layout:
    """Return the layout of a run whose workers have `room` bytes each; where the settings leave but one, at once.

    Of several nodes all have equally many workers.

    A model that can't be run without data recomputes all its blocks on GPUs, where memory is what runs out.
    """
    num_blocks = len(find_decoder_blocks(planned.model)) or 1
    replicated = is_replicated(planned, config, device_type, room)
    only, *others = _list_layouts(planned, config, device_type, replicated, num_blocks, num_nodes)
    if not others:
        return only
    try:
        layout, _ = plan_layout(planned, config, device_type, num_workers, room, num_nodes)
    except ModelError as error:
        logger.info("%s", error.message)
        asked = config.gradient_checkpointing
        num_recomputed = num_blocks if (device_type == "cuda" if asked is None else asked) else 0
        num_replicas = _list_replicas(config, replicated, num_nodes)[-1]
        return Layout(replicated, True, num_recomputed, num_blocks, num_replicas)
    return layout


def plan_layout(
    planned: PlannedModel,
    config: TrainConfig,
    device_type: str,
    num_workers: int,
    room: int,
    num_nodes: int = 1,
) -> tuple[Layout, Memory]:
    """Return the layout that takes the least time of those that fit, and what it needs of each worker.

    If none fits, that is the one that needs least.

    Raises:
        ModelError: as `measure_microbatch` says.
    """
    microbatch = estimate_microbatch(planned, config, device_type)
    replicated = is_replicated(planned, config, device_type, room)
    num_blocks = len(microbatch.savings)
    for layout in _list_layouts(planned, config, device_type, replicated, num_blocks, num_nodes):
        memory = estimate_memory(planned, config, layout, microbatch, device_type, num_workers)
        if memory.total <= SHARE_FOR_ALL * room:
            break
    return layout, memory


def _list_layouts(
    planned: PlannedModel,
    config: TrainConfig,
    device_type: str,
    replicated: bool,
    num_blocks: int,
    num_nodes: int,
) -> Iterator[Layout]:
    """Yield the layouts that the settings allow, the fastest first.

    Gathering again costs less than recomputing, which costs less than gathering from other nodes.
    """
    fewest = num_blocks if config.gradient_checkpointing else 0
    most = 0 if config.gradient_checkpointing is False else num_blocks
    if (
        config.gradient_checkpointing is None
        and device_type == "cuda"
        and keeps_squares(planned, config, device_type)
    ):
        fewest = num_blocks
    for num_replicas in _list_replicas(config, replicated, num_nodes):
        if not replicated and not config.cpu_offload:
            yield Layout(replicated, False, fewest, num_blocks, num_replicas)
        for num_recomputed in range(fewest, most + 1):
            yield Layout(replicated, True, num_recomputed, num_blocks, num_replicas)


def _list_replicas(config: TrainConfig, replicated: bool, num_nodes: int) -> list[int]:
    """Return how often the sharded weights may lie on the workers together, the fastest way first."""
    if replicated or config.fsdp not in ("auto", HYBRID):
        return [1]
    # Within a node alone, they are gathered much faster.
    return [num_nodes] if config.fsdp == HYBRID else sorted({num_nodes, 1}, reverse=True)


def is_replicated(planned: PlannedModel, config: TrainConfig, device_type: str, room: int) -> bool:
    """Return whether the weights lie whole on each worker, of which each has `room` bytes."""
    # Other adapters count on FSDP to cast them to the dtype of the products.
    if not planned.fused or config.cpu_offload or config.fsdp != "auto":
        return planned.fused and not config.cpu_offload and config.fsdp == "no_shard"
    # On CPUs weights as they are stored are shared by the workers of a machine, so they cost nothing more.
    mapped = device_type == "cpu" and planned.stored_dtype == planned.dtype and not config.merge_adapter
    private = {id(p) for p in find_stacked(planned.model)}
    copied = [
        p
        for p in planned.model.parameters()
        if device_type == "cuda"
        or not (p.requires_grad or (mapped and p.is_floating_point() and id(p) not in private))
    ]
    return sum(stored_bytes(p, planned.dtype) for p in copied) <= SHARE_FOR_WEIGHTS * room
