"""A slice of every weight on each worker: PyTorch FSDP2."""

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

from tunesmith.errors import ResourceError
from tunesmith.parallel.blocks import find_blocks
from tunesmith.parallel.casting import cast_weights

# The first torch whose FSDP2 shards tensors of integers: earlier ones make parameters of them that ask for a gradient.
_FIRST_WITH_BYTES = (2, 12)


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    cpu_offload: bool,
    reshard_after_forward: bool = True,
) -> None:
    """Shard `model` in place over `mesh`, block by block and then the rest; compute in `dtype`.

    Frozen weights are kept in `dtype`, or in the bytes that they are stored as. Trained ones are kept in float32, as are their gradients; they are
    cast to `dtype` as they are gathered. Casts happen on the slice, so that no worker ever holds a
    private copy of the whole model. Gradients are summed over the workers, not averaged. Without
    `reshard_after_forward` a block stays gathered until its backward pass is done.

    Collective: every rank must call it.

    Raises:
        ResourceError: weights are stored as bytes, which this torch can't shard.
    """
    check_shardable(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    for block in find_blocks(model):
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload)
    cast_weights(model, dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no averaging; sums also keep the loss independent of the number of workers.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def check_shardable(model: nn.Module, torch_version: str = torch.__version__) -> None:
    """Refuse to shard weights that are stored as bytes where torch is too old for that.

    Raises:
        ResourceError: it names the version.
    """
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        return
    if tuple(int(part) for part in torch_version.split(".")[:2]) < _FIRST_WITH_BYTES:
        raise ResourceError(
            f"weights that are stored as bytes can't be sharded by torch {torch_version}",
            "install torch 2.12 or newer, or keep the weights whole on each worker with --fsdp no_shard",
        )


def release_gathered(model: nn.Module) -> None:
    """Let go of the weights that a forward without a backward pass has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
