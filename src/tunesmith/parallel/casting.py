"""The dtypes that a worker keeps its weights in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tunesmith.compat import apply_to_tensors

# Gives a model's parameters that are on the meta device their values, on another.
Fill = Callable[[nn.Module, torch.device], None]


def cast_weights(model: nn.Module, dtype: torch.dtype, trained: torch.dtype = torch.float32) -> None:
    """Cast the weights that this worker holds, frozen ones to `dtype`; those that are stored as integers stay."""
    wanted = {
        id(p): trained if p.requires_grad else dtype for p in model.parameters() if p.is_floating_point()
    }
    # Buffers are not in `wanted`: rotary frequencies stay in float32.
    apply_to_tensors(model, lambda tensor: tensor.to(wanted[id(tensor)]) if id(tensor) in wanted else tensor)
