"""The whole model on each worker; its gradients are summed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.parallel.casting import Fill, cast_weights
from tunesmith.parallel.mesh import Mesh


def replicate_model(
    model: nn.Module, device: torch.device, dtype: torch.dtype, fill: Fill | None = None
) -> None:
    """Put the whole model on `device`, in place: frozen weights in `dtype` or their bytes, trained ones in float32.

    `fill` reads those weights that are on the meta device.
    """
    cast_weights(model, dtype)
    if fill is not None:
        fill(model, device)
    model.to(device)


def sum_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Add up the gradients of a replicated model over all ranks, in float32. Collective."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:  # this rank had no rows
            parameter.grad = torch.zeros_like(parameter)
    if mesh.size == 1:
        return
    gradients: list[Tensor] = [parameter.grad for parameter in trained if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mesh.sum_in_place(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
