"""Experts that aren't trained cost no product for their own gradients, counted on tensors without data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.tiny_models import build_config
from tunesmith.config import TrainConfig
from tunesmith.planning.dry_run import planned_kernels, run_microbatch
from tunesmith.planning.memory import build_planned_model

NUM_BLOCKS = 2


class GroupedProducts(TorchDispatchMode):
    """Counts products by the dimensions of what comes out: 2 of positions, 3 of experts' gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dimensions: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if "grouped_mm" in func.name():
            self.by_dimensions[output.dim()] += 1
        return output


@pytest.mark.parametrize(
    ("settings", "of_experts"),
    [({"lora_target_modules": ["q_proj"]}, 0), ({"full_ft": True}, 2 * NUM_BLOCKS)],
    ids=str,
)
def test_frozen_experts_get_no_gradient(settings: dict[str, Any], of_experts: int) -> None:
    shape = build_config("mixtral", 64, hidden_size=64, num_hidden_layers=NUM_BLOCKS)
    planned = build_planned_model(TrainConfig(**settings), shape, torch.bfloat16)
    with GroupedProducts() as products:
        run_microbatch(planned.model, 16, 16, planned_kernels("cuda"), fused=True)
    # Two layers of each block: where it is seen which share an input, forward, and back to their inputs.
    assert products.by_dimensions == Counter({2: 6 * NUM_BLOCKS, 3: of_experts})
