"""A slice of every weight on each worker: PyTorch FSDP2."""

from __future__ import annotations

import math

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
from torch.distributed.tensor import DTensor, Shard

from tunesmith.compat import apply_to_tensors, stays_gathered
from tunesmith.errors import ResourceError
from tunesmith.parallel.blocks import find_blocks
from tunesmith.parallel.casting import Fill, cast_weights

# How weights lie, as the setting `fsdp` names it: a slice of all on each worker, or of a node's workers on each of them.
FULL, HYBRID, WHOLE = "full_shard", "hybrid_shard", "no_shard"

# The first torch whose FSDP2 shards tensors of integers: earlier ones make parameters of them that ask for a gradient.
_FIRST_WITH_BYTES = (2, 12)


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    cpu_offload: bool,
    reshard_after_forward: bool = True,
    fill: Fill | None = None,
) -> None:
    """Shard `model` in place over the last axis of `mesh`, block by block and then the rest; compute in `dtype`.

    Along an axis before it, all hold the same.

    Frozen weights are kept in `dtype`, or in the bytes that they are stored as. Trained ones are kept in float32, as
    are their gradients; they are cast to `dtype` as they are gathered. Casts happen on the slice, so that no worker ever holds a
    private copy of the whole model. Gradients are summed over the workers, not averaged. Without
    `reshard_after_forward` a block stays gathered until its backward pass is done. `fill` reads the slices of those
    weights that are on the meta device.

    Collective: every rank must call it.

    Raises:
        ResourceError: weights are stored as bytes, which this torch can't shard.
    """
    check_shardable(model)

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(sharded_dim(parameter.shape, mesh.size(-1)))

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    for block in find_blocks(model):
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=policy,
            offload_policy=offload,
            shard_placement_fn=place,
        )
    fully_shard(
        model,
        mesh=mesh,
        reshard_after_forward=False,
        mp_policy=policy,
        offload_policy=offload,
        shard_placement_fn=place,
    )
    cast_weights(model, dtype)
    if fill is not None:
        fill(model, torch.device("cpu" if cpu_offload else mesh.device_type))
        apply_to_tensors(model, lambda tensor: tensor)  # FSDP then takes up the slices that came
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no averaging; sums also keep the loss independent of the number of workers.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def name_sharding(model: nn.Module) -> str:
    """Return how the weights lie, as the setting `fsdp` names it."""
    if not isinstance(model, FSDPModule):
        return WHOLE
    num_axes = {p.device_mesh.ndim for p in model.parameters() if isinstance(p, DTensor)}
    return HYBRID if 2 in num_axes else FULL


def sync_gradients(model: FSDPModule, is_last: bool, trains_all: bool) -> None:
    """Say before a microbatch whether its gradients are exchanged: the adapters' in the step's `is_last` alone.

    Those of all weights can't wait: whole and in float32, they would cost every worker more memory than the model.
    What a node's workers have added up can. Weights that stay gathered until the backward pass do so until the last.
    """
    model.set_requires_gradient_sync(trains_all or is_last)
    model.set_requires_all_reduce(is_last)
    for module in model.modules():  # type: ignore[attr-defined]
        if isinstance(module, FSDPModule) and stays_gathered(module):
            module.set_reshard_after_backward(is_last, recurse=False)


def sharded_dim(shape: torch.Size, num_slices: int) -> int:
    """Return the dimension along which a weight is cut: the first, but of experts that can't be shared out their rows.

    Where a dimension can't be cut evenly FSDP fills it up: of 8 experts each of 32 ranks would hold memory for one.
    """
    has_uneven_experts = len(shape) == 3 and shape[0] % num_slices and shape[1] % num_slices == 0
    return 1 if has_uneven_experts else 0


def numel_of_slice(shape: torch.Size, num_slices: int) -> int:
    """Return the numbers that each of `num_slices` ranks has memory for of a weight that is cut."""
    if not shape:
        return 1
    length = shape[sharded_dim(shape, num_slices)]
    return math.prod(shape) // length * math.ceil(length / num_slices) if length else 0


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
