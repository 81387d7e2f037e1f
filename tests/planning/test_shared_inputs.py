"""Which adapted layers are handed one tensor is seen without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.runs import small_config
from tunesmith.model.load import load_model_config
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.shared_inputs import find_shared_inputs

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, [ATTENTION, MLP]),
        ("qwen3", {}, [ATTENTION, MLP]),
        ("llama", {"gradient_checkpointing": True}, [ATTENTION, MLP]),
        ("llama", {"lora_target_modules": ["v_proj", "q_proj", "o_proj", "up_proj"]}, [["q_proj", "v_proj"]]),
        ("llama", {"lora_target_modules": ["o_proj", "down_proj"]}, []),
        ("llama", {"full_ft": True}, []),
    ],
)
def test_layers_of_one_parent_that_share_an_input_are_found(
    family: str,
    changes: dict[str, Any],
    expected: list[list[str]],
    model_of: Callable[[str], Path],
    rows: Path,
    tmp_path: Path,
) -> None:
    config = small_config(model_of(family), rows, tmp_path, **changes)
    planned = build_planned_model(config, load_model_config(config.model), torch.float32)
    found = find_shared_inputs(planned.model)
    num_blocks = planned.model.config.num_hidden_layers
    assert [[name.rpartition(".")[2] for name in names] for names in found] == expected * num_blocks
    assert all(len({name.rpartition(".")[0] for name in names}) == 1 for names in found)
    assert not any(module._forward_pre_hooks for module in planned.model.modules())
