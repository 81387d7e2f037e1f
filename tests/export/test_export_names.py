"""Names in the files and in the model: there and back for every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    MambaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from support.exports import load, load_weights
from tunesmith.model.files.weight_names import NameMap

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 300,
}
MODELS: dict[str, PretrainedConfig] = {
    "bloom": BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
    "deepseek_v3": DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "ernie_moe": Ernie4_5_MoeConfig(
        **SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0
    ),
    "falcon": FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gemma3": Gemma3Config(
        text_config={**SMALL, "head_dim": 8},
        vision_config={**SMALL, "image_size": 28, "patch_size": 14},
    ),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_oss": GptOssConfig(**SMALL, head_dim=8, num_local_experts=4),
    "jamba": JambaConfig(
        **SMALL, num_experts=4, expert_layer_period=1, expert_layer_offset=0, attn_layer_period=1,
        attn_layer_offset=0, use_mamba_kernels=False,
    ),
    "mamba": MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, head_dim=8),
    "qwen3_next": Qwen3NextConfig(
        **SMALL, head_dim=8, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_files_become_the_loaded_parameters_and_files_again(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[family]).save_pretrained(tmp_path)
    files, loaded = load_weights(tmp_path), load(tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(MODELS[family])
    names = NameMap(empty, {name: tensor.to("meta") for name, tensor in files.items()})
    assert [name for group in names.groups for name in group.files if not group.parameters] == []
    expected, seen = loaded.state_dict(), set()
    for group in names.groups:
        parameters = names.to_parameters(group, files)
        assert tuple(parameters) == group.parameters
        assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters.items())
        back = names.to_files(group, parameters)
        assert back.keys() == set(group.files)
        assert all(
            torch.equal(tensor.reshape(files[name].shape), files[name]) for name, tensor in back.items()
        )
        seen.update(parameters)
    assert expected.keys() - seen == loaded.all_tied_weights_keys.keys()
