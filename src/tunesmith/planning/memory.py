"""What training needs of a worker's memory, known from shapes before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunesmith.config import TrainConfig
from tunesmith.model.adapters.adapted import adapt_model
from tunesmith.model.attention_choice import EAGER
from tunesmith.model.frozen_weights import Dense, FrozenWeight, store_weights
from tunesmith.model.head import find_head
from tunesmith.model.kernels.lora_linear import trains_plain_adapters_alone
from tunesmith.model.load import attention_of, build_meta_model
from tunesmith.model.quantized import check_quantization
from tunesmith.parallel.blocks import find_blocks
from tunesmith.parallel.casting import cast_weights
from tunesmith.parallel.fsdp import numel_of_slice
from tunesmith.planning.attention import find_attention, own_attention
from tunesmith.planning.dry_run import Microbatch, measure_microbatch, planned_kernels

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a worker holds without a model. CPU: torch, transformers, peft and Ray, inferred from one run's peak.
# GPU: assumed, for the CUDA context, the workspaces of cuBLAS and the buffers of NCCL.
PROCESS_BYTES = {"cpu": 620 << 20, "cuda": 3 << 29}

# Freed tensors that the allocator can't use again: so many bytes, or a share of what a microbatch holds if that is
# more. CPU: fitted to two runs, whose peaks rose over their first steps, with and without recomputation.
_LEAST_HEAP_BYTES = {"cpu": 180 << 20, "cuda": 0}
_HEAP_SHARE = {"cpu": 0.25, "cuda": 0.0}

# Tokens that a CPU runs at once: its products gain little from more, and activations grow with them.
_TOKENS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Memory:
    """Bytes that one worker holds at its peak, by what they are for."""

    weights: int
    """Frozen ones, or with `full_ft` all: as much of them as lies on this worker."""
    gathered: int
    """Whole blocks of sharded weights, while they are computed with."""
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """What the loss needs besides the activations."""
    workspace: int
    """What the backward pass needs more than the loss did."""
    heap: int
    """Freed tensors that the allocator keeps."""
    process: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Layout:
    """How a run lies in a worker's memory, where there is a choice.

    Attributes:
        replicated: whether the weights lie whole on each worker; else they are sharded.
        reshard_after_forward: whether a sharded block's gathered weights go after its forward pass, and come again for
            its backward pass; else they stay for all microbatches of a step.
        num_recomputed: of the `num_blocks` blocks, those that are recomputed: the first ones.
        num_replicas: of sharded weights: equal groups of workers, each of which holds them all.
    """

    replicated: bool
    reshard_after_forward: bool
    num_recomputed: int
    num_blocks: int
    num_replicas: int = 1


@dataclass(frozen=True)
class PlannedModel:
    """A model as it is trained, on the meta device, and what it was made of.

    Attributes:
        fused: whether its adapters are computed with their layers, so that its weights needn't be sharded.
        built_with: the attention backend that transformers gives it where none is asked for.
        drops_by_token: whether its dropout keeps no masks; that of older runs does.
    """

    model: nn.Module
    dtype: torch.dtype
    stored_dtype: torch.dtype
    fused: bool
    built_with: str
    drops_by_token: bool = True


def build_planned_model(
    config: TrainConfig,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    frozen_weight: type[FrozenWeight] = Dense,
) -> PlannedModel:
    """Return the adapted (or fully trainable) model of these settings without weights, to compute in `dtype`.

    Frozen weights are stored as `frozen_weight` does.

    Raises:
        ModelError, ConfigError: as `check_quantization`, `build_meta_model` and `choose_targets` say.
    """
    check_quantization(model_config, str(config.model.source))
    with torch.device("meta"):
        model: Any = build_meta_model(config.model, model_config)
        built_with = attention_of(model)
        model = adapt_model(model, config, dtype)
        store_weights(model, frozen_weight)
    fused = not config.full_ft and trains_plain_adapters_alone(model)
    # Meta tensors of experts multiply in bfloat16 alone.
    has_experts = any(parameter.dim() == 3 for parameter in model.parameters())
    computed = torch.bfloat16 if has_experts else dtype
    # Without fused adapters FSDP casts what is trained as it gathers it.
    cast_weights(model, computed, trained=torch.float32 if fused else computed)
    stored = getattr(model_config.get_text_config(), "dtype", None) or torch.float32
    return PlannedModel(model.train(), dtype, stored, fused, built_with)


def keeps_squares(planned: PlannedModel, config: TrainConfig, device_type: str) -> bool:
    """Return whether attention keeps a square of each example."""
    own = own_attention(planned.model, planned.built_with, config, device_type, planned.dtype)
    return own == EAGER


def sequences_per_forward(batch_size: int, max_seq_length: int, device_type: str) -> int:
    """Return how many sequences of a microbatch are run at once: on GPUs all of them."""
    if device_type != "cpu":
        return batch_size
    return min(batch_size, max(1, _TOKENS_AT_A_TIME // max_seq_length))


def estimate_microbatch(planned: PlannedModel, config: TrainConfig, device_type: str) -> Microbatch:
    """Return what the sequences that are run at once hold.

    Rows are taken to be full, and every token of them to be trained.

    Raises:
        ModelError: as `measure_microbatch` says.
    """
    model: Any = planned.model
    length = config.max_seq_length
    num_tokens = length * sequences_per_forward(config.per_device_train_batch_size, length, device_type)
    own = own_attention(model, planned.built_with, config, device_type, planned.dtype)
    attention = find_attention(model, own, config, device_type, planned.dtype)
    kernels = planned_kernels(device_type, attention)
    found = measure_microbatch(model, num_tokens, length, kernels, planned.drops_by_token)
    return found.times(planned.dtype.itemsize // find_head(model).layer.weight.dtype.itemsize)


def estimate_memory(
    planned: PlannedModel,
    config: TrainConfig,
    layout: Layout,
    microbatch: Microbatch,
    device_type: str,
    num_workers: int,
) -> Memory:
    """Return what each of `num_workers` workers holds at its peak."""
    trained, frozen = count_held(planned, layout, num_workers)
    unsynced = 0 if layout.replicated else count_unsynced(planned, config, device_type)
    if config.cpu_offload and device_type == "cuda":
        trained = frozen = 0  # they lie in the host's memory
    live = microbatch.recompute(layout.num_recomputed)
    return Memory(
        weights=frozen + (4 * trained if config.full_ft else 0),
        gathered=0
        if layout.replicated
        else _gathered_bytes(planned, config.full_ft, layout.reshard_after_forward),
        adapters=0 if config.full_ft else 4 * trained,
        gradients=4 * max(trained, unsynced),
        optimizer=8 * trained,
        activations=live.activations,
        logits=live.loss_peak - live.activations,
        workspace=max(0, live.backward_peak - live.loss_peak),
        heap=max(
            _LEAST_HEAP_BYTES[device_type],
            int(_HEAP_SHARE[device_type] * max(live.loss_peak, live.backward_peak)),
        ),
        process=PROCESS_BYTES[device_type],
    )


def count_held(planned: PlannedModel, layout: Layout, num_workers: int) -> tuple[int, int]:
    """Return what each worker holds of the weights: how many trained numbers, and how many bytes of frozen ones."""
    num_slices = num_workers // layout.num_replicas
    trained = frozen = 0
    for parameter in planned.model.parameters():
        whole = parameter.numel()
        held = whole if layout.replicated else numel_of_slice(parameter.shape, num_slices)
        if parameter.requires_grad:
            trained += held
        elif whole:
            frozen += held * (stored_bytes(parameter, planned.dtype) // whole)
    return trained, frozen


def count_unsynced(planned: PlannedModel, config: TrainConfig, device_type: str) -> int:
    """Return how many numbers the gradients have that FSDP keeps whole between two backward passes of a step.

    Resumed on fewer workers, a run that had one such pass a step has several.
    """
    trained = [parameter.numel() for parameter in planned.model.parameters() if parameter.requires_grad]
    trains_all = len(trained) == sum(1 for _ in planned.model.parameters())
    batch_size = config.per_device_train_batch_size
    at_once = sequences_per_forward(batch_size, config.max_seq_length, device_type)
    num_passes = config.gradient_accumulation_steps * math.ceil(batch_size / at_once)
    return 0 if trains_all or num_passes == 1 else sum(trained)


def stored_bytes(parameter: Tensor, dtype: torch.dtype) -> int:
    """Return the bytes of a parameter of a meta model that computes in `dtype`, which it may have been cast from."""
    itemsize = dtype.itemsize if parameter.is_floating_point() else parameter.itemsize
    return parameter.numel() * itemsize


def _gathered_bytes(planned: PlannedModel, full_ft: bool, reshard_after_forward: bool) -> int:
    """Return what FSDP has whole at once: the outermost weights, and two blocks, one of them on its way, or all."""

    def count(module: nn.Module) -> int:
        return sum(stored_bytes(parameter, planned.dtype) for parameter in module.parameters())

    blocks = [count(block) for block in find_blocks(planned.model)]
    outermost = count(planned.model) - sum(blocks)
    gathered = outermost + (2 * max(blocks, default=0) if reshard_after_forward else sum(blocks))
    # The gradient of a block is whole until it is summed over the workers, in float32.
    widening = 4 // planned.dtype.itemsize
    return gathered + (widening * max([outermost, *blocks]) if full_ft else 0)
