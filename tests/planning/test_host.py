"""What a worker holds of cut weights, and what it needs of its node's memory besides its GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from support.example_models import CONFIGS
from tunesmith.config import TrainConfig
from tunesmith.parallel.fsdp import numel_of_slice, sharded_dim
from tunesmith.planning.host import estimate_host
from tunesmith.planning.memory import Layout, build_planned_model, count_held

MIXTRAL = "mistralai/Mixtral-8x22B-v0.1"
GIB = 1 << 30
SHARDED = Layout(replicated=False, reshard_after_forward=True, num_recomputed=0, num_blocks=2)


def copy_config(**changes: Any) -> PretrainedConfig:
    """Return Mixtral-8x22B's shape with two layers: a slice of the largest weight is no smaller than with 56."""
    return type(CONFIGS[MIXTRAL])(**{**CONFIGS[MIXTRAL].to_dict(), "num_hidden_layers": 2, **changes})


@pytest.mark.parametrize(
    ("shape", "num_slices", "dim", "numel"),
    [
        ((8, 32768, 6144), 8, 0, 32768 * 6144),
        ((8, 32768, 6144), 16, 1, 8 * 32768 * 6144 // 16),
        ((8, 32768, 6144), 4, 0, 2 * 32768 * 6144),
        ((8, 10, 6144), 16, 0, 10 * 6144),  # neither divides: ranks without an expert have room for one
        ((8, 6144), 32, 0, 6144),
        ((300, 64), 7, 0, 43 * 64),
        ((5,), 1, 0, 5),
        ((), 4, 0, 1),
    ],
    ids=str,
)
def test_a_slice_has_room_for_the_largest(
    shape: tuple[int, ...], num_slices: int, dim: int, numel: int
) -> None:
    assert sharded_dim(torch.Size(shape), num_slices) == dim
    assert numel_of_slice(torch.Size(shape), num_slices) == numel


@pytest.mark.parametrize(
    ("config", "model", "least", "most"),
    [
        ({}, {}, 0.18, 0.19),  # a 16th of a layer's gates and ups
        ({"cpu_offload": True}, {}, 0.81, 0.83),  # and a 16th of all weights
        ({"fsdp": "no_shard"}, {}, 3.0, 3.0),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, 10.0, 10.1),
    ],
    ids=["sharded", "offloaded", "whole", "dequantized"],
)
def test_a_node_holds_what_is_being_read_and_what_stays_on_it(
    config: dict[str, Any], model: dict[str, Any], least: float, most: float
) -> None:
    settings, shape = TrainConfig(**config), copy_config(dtype="bfloat16", **model)
    planned = build_planned_model(settings, shape, torch.bfloat16)
    layout = Layout(settings.fsdp == "no_shard", True, 0, 2)
    found = (estimate_host(planned, shape, settings, layout, 16) - 4 * GIB) / GIB
    assert least <= found <= most


def test_a_worker_holds_a_sixteenth_of_eight_experts() -> None:
    planned = build_planned_model(TrainConfig(), copy_config(), torch.bfloat16)
    frozen = [parameter for parameter in planned.model.parameters() if not parameter.requires_grad]
    _, held = count_held(planned, SHARDED, 16)
    assert held == pytest.approx(2 * sum(parameter.numel() for parameter in frozen) / 16, rel=1e-3)
