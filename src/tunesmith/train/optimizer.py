"""AdamW, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
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


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of `step` (from 1): linear warm-up, then down to `min_learning_rate`.

    The peak is reached at the last step of the warm-up, the minimum at step `total_steps`.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    if step <= warmup_steps:
        return config.learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    share = {
        "cosine": 0.5 * (1 + math.cos(math.pi * min(1.0, progress))),
        "linear": 1 - min(1.0, progress),
        "constant": 1.0,
    }[config.lr_scheduler_type]
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use `rate` for the next step of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


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
