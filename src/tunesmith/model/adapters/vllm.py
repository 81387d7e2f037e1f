"""Which PEFT adapters vLLM serves as adapters, and how it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.model.adapters.folder import read_adapter_shapes
from tunesmith.runs.base_model import read_adapter_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
# What vllm.lora.peft_helper and vllm.lora.lora_model refuse: always, or for most families.
_REFUSED_SETTINGS = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
# The others change the base model's weights.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
# What vLLM calls as Hugging Face does in every family; it renames some others.
_COMMON_MODULES = frozenset(
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def vllm_refuses(
    adapter: Path, model_config: PretrainedConfig | None = None, use_gpu: bool = True
) -> str | None:
    """Return why vLLM can't serve a PEFT folder as an adapter; None if nothing speaks against it.

    `model_config` is the base model's. Families without LoRA in vLLM are found only when the engine starts.
    """
    settings = read_adapter_config(adapter)
    init = settings.get("init_lora_weights", True)
    if settings.get("peft_type", "LORA") != "LORA":
        return f"its type is {settings['peft_type']}"
    for name in _REFUSED_SETTINGS:
        if settings.get(name):
            return f"it sets `{name}`"
    if settings.get("bias", "none") != "none":
        return "it trains biases"
    if isinstance(init, str) and init not in _PLAIN_INITS:
        return f"its `init_lora_weights` is {init}, which changes the base model"
    if (rank := _rank(settings)) > _LORA_RANKS[-1]:
        return f"its rank is {rank}, and vLLM's limit {_LORA_RANKS[-1]}"
    if adapted := [name for name in _adapted_modules(adapter) if name in _EMBEDDINGS]:
        return f"it adapts `{adapted[0]}`, which vLLM serves for some families alone"
    if whole := [name for name in read_adapter_shapes(adapter) if ".lora_" not in name]:
        return f"it holds `{whole[0]}` whole"
    if model_config is not None and not use_gpu and _has_experts(model_config):
        return "on the CPU, vLLM serves no adapter on a model with experts"
    return None


def lora_arguments(*adapters: Path) -> dict[str, Any]:
    """Return the arguments of vllm.LLM with which it serves the adapters."""
    rank = max(_rank(read_adapter_config(adapter)) for adapter in adapters)
    arguments: dict[str, Any] = {
        "enable_lora": True,
        "max_lora_rank": min(limit for limit in _LORA_RANKS if limit >= rank),
    }
    of_each = [_adapted_modules(adapter) for adapter in adapters]
    modules = sorted({name for modules in of_each for name in modules})
    if all(of_each) and _COMMON_MODULES.issuperset(modules):
        # Else it computes for modules without an adapter too, the head above all.
        arguments["lora_target_modules"] = modules
    return arguments


def _rank(settings: dict[str, Any]) -> int:
    """Return an adapter's largest rank."""
    ranks: list[int] = [settings["r"], *(settings.get("rank_pattern") or {}).values()]
    return max(ranks)


def _adapted_modules(adapter: Path) -> list[str]:
    """Return the last parts of the adapted modules' names."""
    return sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in read_adapter_shapes(adapter)})


def _has_experts(model_config: PretrainedConfig) -> bool:
    text_config = model_config.get_text_config()
    return any((getattr(text_config, name, 0) or 0) > 1 for name in _EXPERT_COUNTS)
