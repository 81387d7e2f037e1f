"""What a worker with a GPU needs of its node's memory, besides its GPU's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.config import TrainConfig
from tunesmith.model.unread import may_stay_unread
from tunesmith.parallel.fsdp import numel_of_slice
from tunesmith.planning.memory import Layout, PlannedModel, count_held

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Assumed: torch with CUDA's libraries, transformers, peft and Ray.
_PROCESS_BYTES = 4 << 30


def estimate_host(
    planned: PlannedModel,
    model_config: PretrainedConfig,
    config: TrainConfig,
    layout: Layout,
    num_workers: int,
) -> int:
    """Return the bytes of its node's memory that each worker needs at its peak, which may be while it loads.

    Weights are read by slices, each of which is on its GPU before the next is read; those that can't be, whole. Later a
    copy of what checkpoints hold is kept. What is mapped isn't counted: the node gives it up when it must.
    """
    parameters = [*planned.model.parameters()]
    width = planned.stored_dtype.itemsize
    if config.needs_weights or not may_stay_unread(config.model, model_config):
        read = width * sum(parameter.numel() for parameter in parameters)
    elif layout.replicated:
        read = width * max(parameter.numel() for parameter in parameters)
    else:
        num_slices = num_workers // layout.num_replicas
        read = width * max(numel_of_slice(parameter.shape, num_slices) for parameter in parameters)
    trained, frozen = count_held(planned, layout, num_workers)
    # Weights, gradients and AdamW's two moments.
    offloaded = frozen + 16 * trained if config.cpu_offload else 0
    saved = 12 * trained  # but the gradients
    return _PROCESS_BYTES + max(read, saved) + offloaded
