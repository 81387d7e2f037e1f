"""Tiny configurations of more families: whatever a model may do to its scores, its positions or its logits.

Windows, chunks and caps are so tight that rows of `LENGTH` tokens feel them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    StableLmConfig,
    VaultGemmaConfig,
)

from support.tiny_models import FAMILIES, build_config

LENGTH = 40

_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": None,
}
_GATED = {**_SHAPE, "intermediate_size": 64, "num_key_value_heads": 2}
WINDOWED = {**_GATED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
_OF_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "eos_token_id": 0, "bos_token_id": 0}

_OTHERS: dict[str, Callable[..., PretrainedConfig]] = {
    "biogpt": partial(BioGptConfig, **_SHAPE, intermediate_size=64),
    "bloom": partial(BloomConfig, hidden_size=32, n_layer=2, n_head=4, eos_token_id=0, bos_token_id=0),
    "cohere": partial(CohereConfig, **_GATED, logit_scale=0.25),
    "cohere2": partial(Cohere2Config, **_GATED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
    "falcon": partial(FalconConfig, **_SHAPE),
    "falcon_alibi": partial(FalconConfig, **_SHAPE, alibi=True, new_decoder_architecture=False),
    "gemma2": partial(
        Gemma2Config, **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "gemma3": partial(
        Gemma3TextConfig, **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": partial(GPT2Config, **_OF_GPT2),
    "gpt_neo": partial(
        GPTNeoConfig, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=8, max_position_embeddings=512, eos_token_id=0, bos_token_id=0,
    ),
    "gpt_oss": partial(GptOssConfig, **_GATED, head_dim=8, sliding_window=8, num_local_experts=4),
    "granite": partial(
        GraniteConfig, **_GATED, logits_scaling=4.0, attention_multiplier=0.2, residual_multiplier=0.5,
        embedding_multiplier=3.0,
    ),
    "llama4": partial(
        Llama4TextConfig, **_GATED, head_dim=8, intermediate_size_mlp=64, attention_chunk_size=8,
        num_local_experts=2, layer_types=["chunked_attention", "full_attention"],
    ),
    "mpt": partial(MptConfig, d_model=32, n_heads=4, n_layers=2, max_seq_len=512),
    "opt": partial(
        OPTConfig, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=512, eos_token_id=0, bos_token_id=0,
    ),
    "phi": partial(PhiConfig, **_SHAPE, intermediate_size=64),
    "qwen2": partial(Qwen2Config, **WINDOWED),
    "stablelm": partial(StableLmConfig, **_GATED),
    "vaultgemma": partial(
        VaultGemmaConfig, **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
        attn_logit_softcapping=2.0, final_logit_softcapping=None,
    ),
}  # fmt: skip

EVERY_FAMILY = (*FAMILIES, *_OTHERS)


def family_config(family: str, vocab_size: int = 300, **changes: Any) -> PretrainedConfig:
    """Return the tiny configuration of one of `EVERY_FAMILY`."""
    if family in _OTHERS:
        return _OTHERS[family](vocab_size=vocab_size, **changes)
    return build_config(family, vocab_size, **changes)


def family_model(family: str, **changes: Any) -> Any:
    """Return a tiny model of one of `EVERY_FAMILY`, in float32, with weights so large that attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
