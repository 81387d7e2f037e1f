"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from tunesmith.config import TrainConfig


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
