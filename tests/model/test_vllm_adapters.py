"""Which adapters vLLM is given as adapters, and what it is told about them; without vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from support.exports import load, write_adapter
from tunesmith.model.adapters.vllm import lora_arguments, vllm_refuses

ModelOf = Callable[[str], Path]
Q_PROJ: dict[str, Any] = {"target_modules": ["q_proj"]}


def test_an_adapter_on_linear_layers_is_served(model_of: ModelOf, tmp_path: Path) -> None:
    folder = write_adapter(model_of("llama"), tmp_path, target_modules="all-linear", use_rslora=True).folder
    assert vllm_refuses(folder) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({**Q_PROJ, "use_dora": True}, "`use_dora`"),
        ({**Q_PROJ, "bias": "lora_only"}, "biases"),
        ({**Q_PROJ, "lora_bias": True}, "`lora_bias`"),
        ({**Q_PROJ, "modules_to_save": ["norm"]}, "`modules_to_save`"),
        ({**Q_PROJ, "init_lora_weights": "olora"}, "olora"),
        ({**Q_PROJ, "init_lora_weights": "lora_ga"}, "lora_ga"),
        ({**Q_PROJ, "r": 600}, "rank is 600"),
        ({**Q_PROJ, "rank_pattern": {"layers.1.*": 600}}, "rank is 600"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "`embed_tokens`"),
        ({"target_modules": ["q_proj", "lm_head"]}, "`lm_head`"),
    ],
)
def test_what_vllm_refuses_is_named(
    model_of: ModelOf, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    assert named in str(vllm_refuses(write_adapter(model_of("qwen3"), tmp_path, **settings).folder))


def test_embeddings_that_were_grown_are_named(model_of: ModelOf, tmp_path: Path) -> None:
    model = load(model_of("qwen3"))
    model.resize_token_embeddings(model.config.vocab_size + 2, mean_resizing=False)
    get_peft_model(model, LoraConfig(**Q_PROJ)).save_pretrained(tmp_path)
    assert "weight` whole" in str(vllm_refuses(tmp_path))


def test_adapted_experts_are_named(model_of: ModelOf, tmp_path: Path) -> None:
    settings = {**Q_PROJ, "target_parameters": ["experts.gate_up_proj"]}
    assert "`target_parameters`" in str(
        vllm_refuses(write_adapter(model_of("mixtral"), tmp_path, **settings).folder)
    )


def test_a_model_with_experts_takes_no_adapter_on_the_cpu(model_of: ModelOf, tmp_path: Path) -> None:
    folder = write_adapter(model_of("mixtral"), tmp_path, **Q_PROJ).folder
    config = AutoConfig.from_pretrained(model_of("mixtral"))
    assert "experts" in str(vllm_refuses(folder, config, use_gpu=False))
    assert vllm_refuses(folder, config, use_gpu=True) is None


def test_other_kinds_of_adapters_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    assert "IA3" in str(vllm_refuses(tmp_path))


@pytest.mark.parametrize(
    ("settings", "limit"),
    [({"r": 1}, 1), ({"r": 4}, 8), ({"r": 24}, 32), ({"r": 8, "rank_pattern": {"layers.1.*": 40}}, 64)],
)
def test_the_rank_limit_is_the_least_that_holds_the_adapter(
    model_of: ModelOf, tmp_path: Path, settings: dict[str, Any], limit: int
) -> None:
    folder = write_adapter(model_of("llama"), tmp_path, **Q_PROJ, **settings).folder
    assert lora_arguments(folder)["max_lora_rank"] == limit


def test_vllm_computes_for_the_adapted_modules_alone(model_of: ModelOf, tmp_path: Path) -> None:
    folder = write_adapter(model_of("llama"), tmp_path, target_modules=["up_proj", "q_proj"]).folder
    assert lora_arguments(folder)["lora_target_modules"] == ["q_proj", "up_proj"]
