"""The dtypes that a worker keeps its weights in."""

from __future__ import annotations

import torch
from torch import nn


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that this worker holds: frozen ones to `dtype`, trained ones to float32."""
    wanted = {id(p): torch.float32 if p.requires_grad else dtype for p in model.parameters()}
    # Buffers are not in `wanted`: rotary frequencies stay in float32.
    model._apply(lambda tensor: tensor.to(wanted[id(tensor)]) if id(tensor) in wanted else tensor)
