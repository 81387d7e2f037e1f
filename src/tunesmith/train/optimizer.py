"""AdamW over the trained parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from tunesmith.config import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> AdamW:
    """Return AdamW over the trained parameters; matrices decay, vectors (norms, biases) don't."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)
    _initialize_state(optimizer)
    return optimizer


def _initialize_state(optimizer: Optimizer) -> None:
    """Give every parameter the state that AdamW makes at its first step.

    A checkpoint is loaded into it, and holds the same tensors whether or not a gradient ever came.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
