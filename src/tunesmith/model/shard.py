"""FSDP2: each worker holds a slice of every weight, and gathers one block at a time."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)


def shard_model(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, cpu_offload: bool) -> None:
    """Shard `model` in place over `mesh`, block by block and then the rest; compute in `dtype`.

    Frozen weights are kept in `dtype`. Trained ones are kept in float32, as are their gradients; they are
    cast to `dtype` as they are gathered. Casts happen on the slice, so that no worker ever holds a
    private copy of the whole model. Gradients are summed over the workers, not averaged.

    Collective: every rank must call it.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for block in find_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    _cast_slices(
        model, {name: dtype if name in frozen else torch.float32 for name, _ in model.named_parameters()}
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no averaging; sums also keep the loss independent of the number of workers.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated blocks, by the class names that transformers keeps for splitting."""
    names = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or [])
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in inner]


def _cast_slices(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    wanted = {id(parameter): dtypes[name] for name, parameter in model.named_parameters()}
    # Buffers are not in `wanted`: rotary frequencies stay in float32.
    model._apply(lambda tensor: tensor.to(wanted[id(tensor)]) if id(tensor) in wanted else tensor)
