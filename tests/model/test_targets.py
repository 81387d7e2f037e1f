"""By default LoRA adapts every linear layer of the blocks that PEFT adapts, whatever the family calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tunesmith.config import TrainConfig
from tunesmith.model.adapters.lora import add_adapters
from tunesmith.model.kernels.install import CPU, install_kernels

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
EXPERTS = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
# A family's configuration, and the names of its adapted layers.
FAMILIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (COMMON, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    "deepseek_v3": ({**COMMON, **EXPERTS, **LATENT}, {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
    "glm4_moe": ({**COMMON, **EXPERTS, "num_key_value_heads": 1, "head_dim": 8}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "llama4_text": (
        {**COMMON, "intermediate_size_mlp": 24, "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "mamba": ({"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, {"in_proj", "x_proj", "dt_proj"}),
    "ctrl": ({"vocab_size": 64, "n_positions": 16, "n_embd": 16, "dff": 24, "n_layer": 2, "n_head": 2}, {"Wq", "Wk", "Wv", "dense", "0", "2"}),
}  # fmt: skip


def build(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family][0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_adapted_and_trained_by_default(family: str) -> None:
    model = add_adapters(build(family), TrainConfig(model_path="model", dataset_name="rows"))
    install_kernels(model, CPU)
    adapted = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    assert adapted == FAMILIES[family][1]
    ids = torch.arange(8).unsqueeze(0)
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".lora_B." in name}
    assert any(g is not None and g.abs().sum() > 0 for g in gradients.values())
