"""From weights on disk to a model that is ready to train."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from tunesmith.config import TrainConfig
from tunesmith.errors import ModelError
from tunesmith.model.attention import VARLEN
from tunesmith.model.elementwise import fuse_elementwise
from tunesmith.model.load import attention_of, load_model, narrowest_window, resolve_dtype
from tunesmith.model.lora import add_adapters
from tunesmith.model.lora_linear import fuse_adapters
from tunesmith.model.probe import fuses_loss, use_varlen_attention
from tunesmith.model.shard import fits_whole, replicate_model, shard_model


def build_model(config: TrainConfig, device: torch.device, world_size: int) -> nn.Module:
    """Return the adapted (or fully trainable) model in training mode, placed on its workers. Collective."""
    dtype = resolve_dtype(config, device)
    model: nn.Module = load_model(config, device)
    for parameter in model.parameters():
        parameter.requires_grad_(config.full_ft)
    fused = False
    if not config.full_ft:
        model = add_adapters(model, config)
        fused = fuse_adapters(model)
    fuse_elementwise(model)
    if uses_gradient_checkpointing(config, device):
        # After PEFT: before, it would make the embeddings' output need a gradient that nothing uses.
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    # Other adapters count on FSDP to cast them to the dtype of the products.
    if fused and not config.cpu_offload and _replicates(config, model, device, dtype, world_size):
        replicate_model(model, device, dtype)
    else:
        shard_model(model, init_device_mesh(device.type, (world_size,)), dtype, config.cpu_offload)
    return model.train()


def choose_ways(config: TrainConfig, model: nn.Module, device: torch.device) -> bool:
    """Let the model attend in the fastest way that it allows, and return whether its loss can be fused. Collective.

    Raises:
        ModelError: the model doesn't allow the attention that the settings name.
    """
    dtype = resolve_dtype(config, device)
    if _may_use_varlen(config, model):
        uses_varlen = use_varlen_attention(model, device, dtype)
        if not uses_varlen and config.attn_implementation == VARLEN:
            raise ModelError(
                f"`attn_implementation` is `{VARLEN}`, which doesn't compute the attention of `{config.model_source}`",
                "leave `attn_implementation` out",
            )
    return fuses_loss(model, device, dtype)


def _replicates(
    config: TrainConfig, model: nn.Module, device: torch.device, dtype: torch.dtype, world_size: int
) -> bool:
    if config.fsdp != "auto":
        return config.fsdp == "no_shard"
    return fits_whole(model, device, dtype, world_size)


def _may_use_varlen(config: TrainConfig, model: nn.Module) -> bool:
    if config.attn_implementation != "auto":
        return config.attn_implementation == VARLEN
    return not attention_of(model).startswith("flash") and config.max_seq_length <= narrowest_window(model)


def uses_gradient_checkpointing(config: TrainConfig, device: torch.device) -> bool:
    """Return whether activations are recomputed: as set, else on GPUs, where memory is what runs out."""
    return device.type == "cuda" if config.gradient_checkpointing is None else config.gradient_checkpointing


def describe_choices(model: nn.Module, fused_loss: bool, config: TrainConfig, device: torch.device) -> str:
    """Return in one line what was chosen where the settings leave a choice."""
    dtype = str(resolve_dtype(config, device)).removeprefix("torch.")
    recompute = "on" if uses_gradient_checkpointing(config, device) else "off"
    return (
        f"{dtype}, attention {attention_of(model)}, loss {'fused' if fused_loss else 'of whole logits'}, "
        f"weights {'sharded' if isinstance(model, FSDPModule) else 'whole on each worker'}, "
        f"gradient checkpointing {recompute}, {torch.get_num_threads()} CPU threads"
    )
