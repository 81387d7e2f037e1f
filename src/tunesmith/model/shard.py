"""Where the weights lie: a slice of every one on each worker (FSDP2), or all of the frozen ones on each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)


def holds_on_all_ranks(condition: bool, device: torch.device) -> bool:
    """Return whether the condition holds on every rank: what follows from it must be the same on all. Collective."""
    holds = torch.tensor(int(condition), device=device)
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds.item())


def replicate_model(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put the whole model on `device`, in place: frozen weights in `dtype`, trained ones in float32."""
    _cast(model, dtype)
    model.to(device)


def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of a replicated model over all ranks, in float32. Collective."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # this rank had no rows
            parameter.grad = torch.zeros_like(parameter)
    if dist.get_world_size() == 1:
        return
    gradients: list[Tensor] = [parameter.grad for parameter in trained if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def shard_model(
    model: nn.Module,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    cpu_offload: bool,
    reshard_after_forward: bool = True,
) -> None:
    """Shard `model` in place over `mesh`, block by block and then the rest; compute in `dtype`.

    Frozen weights are kept in `dtype`. Trained ones are kept in float32, as are their gradients; they are
    cast to `dtype` as they are gathered. Casts happen on the slice, so that no worker ever holds a
    private copy of the whole model. Gradients are summed over the workers, not averaged. Without
    `reshard_after_forward` a block stays gathered until its backward pass is done.

    Collective: every rank must call it.
    """
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
    _cast(model, dtype)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no averaging; sums also keep the loss independent of the number of workers.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def release_gathered(model: nn.Module) -> None:
    """Let go of the weights that a forward without a backward pass has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated blocks, by the class names that transformers keeps for splitting."""
    names = set()
    for module in model.modules():
        names |= set(getattr(module, "_no_split_modules", None) or [])
    # A sharded block has a class of its own, made from the block's.
    blocks = [
        module for module in model.modules() if names & {kind.__name__ for kind in type(module).__mro__}
    ]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if id(block) not in inner]


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that this worker holds: frozen ones to `dtype`, trained ones to float32."""
    wanted = {id(p): torch.float32 if p.requires_grad else dtype for p in model.parameters()}
    # Buffers are not in `wanted`: rotary frequencies stay in float32.
    model._apply(lambda tensor: tensor.to(wanted[id(tensor)]) if id(tensor) in wanted else tensor)
