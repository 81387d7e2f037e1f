"""Tiny real models of each family, made from their own configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

FAMILIES = ("llama", "qwen3", "mistral", "mixtral", "phi3", "gemma")


def build_config(family: str, vocab_size: int, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a model of some 30,000 weights."""
    shape = {**_SHAPE, "vocab_size": vocab_size, "eos_token_id": 0, "pad_token_id": None, **changes}
    match family:
        case "llama":
            return LlamaConfig(**shape, tie_word_embeddings=True)
        case "qwen3":
            return Qwen3Config(**shape, head_dim=8)
        case "mistral":
            return MistralConfig(**shape, sliding_window=16)
        case "mixtral":
            return MixtralConfig(**{"num_local_experts": 4, "num_experts_per_tok": 2, **shape})
        case "phi3":
            return Phi3Config(**shape)
        case "gemma":
            return GemmaConfig(**shape, head_dim=8)
    raise ValueError(family)


def save_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write a tiny model and the tokenizer to `folder`, as a Hugging Face folder."""
    torch.manual_seed(0)
    rows = changes.pop("vocab_size", len(tokenizer))
    config = build_config(family, rows, **{"eos_token_id": tokenizer.eos_token_id, **changes})
    model = AutoModelForCausalLM.from_config(config)
    # Larger than usual: with the usual 0.02 attention hardly matters in a model this small.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
