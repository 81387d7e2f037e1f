"""From weights on disk to a model that is ready to train."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tunesmith.config import TrainConfig
from tunesmith.model.load import attention_of, load_model, resolve_dtype
from tunesmith.model.lora import add_adapters
from tunesmith.model.shard import shard_model


def build_model(config: TrainConfig, device: torch.device, world_size: int) -> nn.Module:
    """Return the adapted (or fully trainable), sharded model in training mode. Collective."""
    model: nn.Module = load_model(config, device)
    for parameter in model.parameters():
        parameter.requires_grad_(config.full_ft)
    if not config.full_ft:
        model = add_adapters(model, config)
    if uses_gradient_checkpointing(config, device):
        # After PEFT: before, it would make the embeddings' output need a gradient that nothing uses.
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    mesh = init_device_mesh(device.type, (world_size,))
    shard_model(model, mesh, resolve_dtype(config, device), config.cpu_offload)
    return model.train()


def uses_gradient_checkpointing(config: TrainConfig, device: torch.device) -> bool:
    """Return whether activations are recomputed: as set, else on GPUs, where memory is what runs out."""
    return device.type == "cuda" if config.gradient_checkpointing is None else config.gradient_checkpointing


def describe_choices(model: nn.Module, config: TrainConfig, device: torch.device) -> str:
    """Return in one line what was chosen where the settings leave a choice."""
    dtype = str(resolve_dtype(config, device)).removeprefix("torch.")
    recompute = "on" if uses_gradient_checkpointing(config, device) else "off"
    return (
        f"{dtype}, attention {attention_of(model)}, gradient checkpointing {recompute}, "
        f"{torch.get_num_threads()} CPU threads"
    )
