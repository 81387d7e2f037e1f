"""Models with random weights, and rows of random tokens: nothing is fetched."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

_LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.2-3b": {
        **_LLAMA_3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,  # at the usual 0.02 every loss is that of guessing
    },
}
# Heads as wide as real ones: kernels for GPUs are written for such.
WIDE_HEADS: dict[str, Any] = {
    **SHAPES["tiny"],
    "hidden_size": 256,
    "head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WINDOWED: dict[str, Any] = {**WIDE_HEADS, "model_type": "mistral", "sliding_window": 16}

_SHORTEST = 8


def write_model(shape: dict[str, Any], folder: Path, device: torch.device) -> None:
    """Write a model with random weights and a tokenizer of one token a word, made on `device`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    num_words = shape["vocab_size"] - 1
    vocabulary = {"<end>": num_words, **{f"t{i}": i for i in range(num_words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    config = AutoConfig.for_model(**shape, bos_token_id=None, eos_token_id=num_words)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def write_rows(path: Path, lengths: Iterable[int], num_words: int) -> Path:
    """Write rows of so many random tokens each, the end token included; all but the first are trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(0)
    with path.open("w") as file:
        for length in lengths:
            first, *others = (f"t{numbers.randrange(num_words)}" for _ in range(length - 1))
            file.write(json.dumps({"prompt": first, "completion": " " + " ".join(others)}) + "\n")
    return path


def mixed_lengths(num_tokens: int, longest: int) -> Iterator[int]:
    """Yield the lengths of examples as data sets have them, most of them short, of `num_tokens` in all."""
    numbers = random.Random(0)
    while num_tokens > 0:
        length = min(longest, _SHORTEST + int(numbers.expovariate(8 / longest)))
        num_tokens -= length
        yield length
