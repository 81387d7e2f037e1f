"""An adapter fits the model that it was made for, and no other: told from names and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, Qwen2Config

from support.tiny_models import build_config
from tunesmith.errors import ModelError
from tunesmith.model.adapters.folder import read_adapter_shapes
from tunesmith.model.fit import check_adapter_fits

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "tied": build_config("llama", 100),
    "biased": Qwen2Config(**SMALL),
    "conv1d": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100),
    "experts": build_config("mixtral", 100),
}
TARGETS = {
    "tied": ["q_proj", "embed_tokens", "lm_head"],
    "biased": ["q_proj", "down_proj"],
    "conv1d": ["c_attn"],
    "experts": ["q_proj"],
}


def model_of(name: str) -> Any:
    return AutoModelForCausalLM.from_config(CONFIGS[name])


def adapter_of(name: str, folder: Path) -> Path:
    config = LoraConfig(r=4, target_modules=TARGETS[name], task_type="CAUSAL_LM")
    get_peft_model(model_of(name), config).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_fits_its_own_model(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = model_of(name)
    check_adapter_fits(model, read_adapter_shapes(adapter_of(name, tmp_path)), name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", ["biased", "conv1d"])
def test_an_adapter_of_another_model_is_refused_by_name(other: str, tmp_path: Path) -> None:
    shapes = read_adapter_shapes(adapter_of("conv1d" if other == "biased" else "biased", tmp_path))
    with pytest.raises(ModelError, match=f"wasn't made from `{other}`: `.*` is absent"):
        check_adapter_fits(model_of(other), shapes, other)


def test_a_torn_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_adapter_shapes(tmp_path)
