"""From weights on disk to a model that is ready to train."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from tunesmith.config import TrainConfig
from tunesmith.errors import ModelError
from tunesmith.model.adapters.adapted import adapt_model
from tunesmith.model.attention_choice import may_use_varlen, warn_of_other_attention
from tunesmith.model.files.weight_names import find_stacked
from tunesmith.model.frozen_weights import Dense, FrozenWeight, store_weights
from tunesmith.model.kernels.attention import VARLEN
from tunesmith.model.kernels.install import Kernels, install_kernels, kernels_for
from tunesmith.model.kernels.newer_flash import activate_newer_flash
from tunesmith.model.load import attention_of, load_model, load_model_config, resolve_dtype
from tunesmith.model.probe import attend_eagerly, attends_rightly, fuses_loss, use_varlen_attention
from tunesmith.model.unread import UnreadWeights, load_unread
from tunesmith.parallel.activation_checkpointing import (
    count_recomputed,
    describe_recomputation,
    recompute_first,
)
from tunesmith.parallel.collectives import holds_on_all_ranks
from tunesmith.parallel.fsdp import FULL, HYBRID, WHOLE, name_sharding, shard_model
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.replicate import replicate_model
from tunesmith.planning.layout import choose_layout, find_room
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.shared_inputs import find_shared_inputs

logger = logging.getLogger(__name__)

_PLACED = {
    WHOLE: "whole on each worker",
    FULL: "sharded",
    HYBRID: "sharded within each node",
}


def build_model(
    config: TrainConfig,
    device: torch.device,
    mesh: Mesh,
    frozen_weight: type[FrozenWeight] = Dense,
    kernels: Kernels | None = None,
    drops_by_token: bool = True,
    needed: float = 1.0,
) -> nn.Module:
    """Return the adapted (or fully trainable) model in training mode, placed on its workers. Collective.

    Frozen weights are stored as `frozen_weight` does. Without `kernels` the model computes as its device likes. What
    isn't dropped `drops_by_token` keeps masks, for which there must be room. A layout counts with `needed` times the
    memory that is planned.
    """
    dtype = resolve_dtype(config.dtype, device)
    planned = build_planned_model(config, load_model_config(config.model), dtype, frozen_weight)
    planned = replace(planned, drops_by_token=drops_by_token)
    room = int(find_room(device, mesh.size) / needed)
    layout = choose_layout(planned, config, device.type, mesh.size, room, mesh.num_nodes)
    # A CPU's workers share the pages of what is as the files have it.
    stays_mapped = layout.replicated and device.type == "cpu" and not find_stacked(planned.model)
    by_slices = frozen_weight is Dense and not stays_mapped and not config.needs_weights
    model, unread = _load_adapted(config, device, dtype, by_slices)
    store_weights(model, frozen_weight)
    install_kernels(model, kernels or kernels_for(device.type), find_shared_inputs(planned.model))
    if layout.num_recomputed:
        recompute_first(model, layout.num_recomputed)
    fill = unread.release(model) if unread else None
    if layout.replicated:
        replicate_model(model, device, dtype, fill)
    else:
        if mesh.unequal_nodes:
            logger.info("the weights are sharded over all nodes: %s", mesh.unequal_nodes)
        ranks = mesh.lay_out_weights(device, layout.num_replicas)
        shard_model(model, ranks, dtype, config.cpu_offload, layout.reshard_after_forward, fill)
    return model.train()


def _load_adapted(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, by_slices: bool
) -> tuple[nn.Module, UnreadWeights | None]:
    """Return the model with its adapters, and with `by_slices` what of it is still to be read, if it can be read so."""
    wanted = config.model, device, dtype, config.attn_implementation
    unread = load_unread(*wanted) if by_slices else None
    if unread is not None:
        model = adapt_model(unread.model, config, dtype)
        if unread.is_untouched(model):
            return model, unread
    return adapt_model(load_model(*wanted), config, dtype), None


def choose_ways(config: TrainConfig, model: nn.Module, device: torch.device) -> bool:
    """Let the model attend in the fastest way that it allows, and return whether its loss can be fused. Collective.

    Raises:
        ModelError: the model doesn't allow the attention that the settings name.
    """
    dtype = resolve_dtype(config.dtype, device)
    activate_newer_flash(device, model)
    if may_use_varlen(config.attn_implementation, attention_of(model)):
        uses_varlen = use_varlen_attention(model, device, dtype, config.max_seq_length)
        if not uses_varlen and config.attn_implementation == VARLEN:
            raise ModelError(
                f"`attn_implementation` is `{VARLEN}`, which doesn't compute the attention of `{config.model.source}`",
                "leave `attn_implementation` out",
            )
    own = attention_of(model)
    if own != VARLEN and not holds_on_all_ranks(attends_rightly(model, device), device):
        if config.attn_implementation == "auto":
            logger.info("`%s` doesn't compute the attention of `%s`", own, config.model.source)
            attend_eagerly(model)
        else:
            warn_of_other_attention(own, load_model_config(config.model), str(config.model.source))
    return fuses_loss(model, device)


def describe_choices(model: nn.Module, fused_loss: bool, config: TrainConfig, device: torch.device) -> str:
    """Return in one line what was chosen where the settings leave a choice."""
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    return (
        f"{dtype}, attention {attention_of(model)}, loss {'fused' if fused_loss else 'of whole logits'}, "
        f"weights {_PLACED[name_sharding(model)]}, "
        f"gradient checkpointing {describe_recomputation(*count_recomputed(model))}, "
        f"{'blocks compiled, ' if config.torch_compile else ''}{torch.get_num_threads()} CPU threads"
    )
