"""The flags of vLLM's server that follow from what it serves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.config import ServeConfig
from tunesmith.errors import ConfigError
from tunesmith.evaluate.engines.vllm import cache_bytes
from tunesmith.evaluate.plan import choose_dtype
from tunesmith.model.adapters.vllm import lora_arguments
from tunesmith.model.load import build_meta_model, read_generation_config
from tunesmith.serving.models import Served

# vLLM's CPU kernels copy the adapters' weights for every token of a step: large steps are slow and take gigabytes.
_CPU_TOKENS_A_STEP = 128
_CPU_SEQUENCES = 8
_UNLIMITED = 4096  # tokens that are planned for where a model sets no limit
_SHARE_FOR_WEIGHTS = 0.8  # of what vLLM may take of a GPU; the rest holds keys and values

# What vLLM takes over of a generation config (vllm.config.ModelConfig.get_diff_sampling_param).
_SAMPLING = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
)


@dataclass(frozen=True)
class Flags:
    """The words of a command line, and what vLLM reads of files: a generation config, and a chat template, None for the
    tokenizer's own."""

    words: list[str]
    generation_config: dict[str, Any]
    chat_template: str | None


def make_flags(config: ServeConfig, served: Served) -> Flags:
    """Return the flags with which vLLM serves what was found.

    Raises:
        ConfigError: more GPUs are asked for than there are.
    """
    model = served.model
    words = ["--model", str(model.source)]
    if model.revision:
        words += ["--revision", model.revision]
    name = model.name if served.adapters else served.names[0]
    words += ["--served-model-name", name, "--host", config.host, "--port", str(config.port)]
    dtype = choose_dtype(config.dtype, served.ready[0].tuned, served.use_gpu)
    words += ["--dtype", dtype]
    words += ["--max-model-len", str(config.max_model_len or "auto")]
    if served.tokenizer is not None:
        words += ["--tokenizer", str(served.tokenizer)]
    if model.trust_remote_code:
        words += ["--trust-remote-code"]
    if served.adapters:
        words += _lora_flags(served)
    if served.use_gpu:
        words += _gpu_flags(config, served)
    else:
        longest = config.max_model_len or served.ready[0].positions or _UNLIMITED
        words += _cpu_flags(served, dtype, longest)
    return Flags(words, _generation_config(served), served.chat_template)


def _lora_flags(served: Served) -> list[str]:
    arguments = lora_arguments(*(folder for _, folder in served.adapters))
    number = str(len(served.adapters))
    words = ["--enable-lora", "--max-lora-rank", str(arguments["max_lora_rank"])]
    words += ["--max-loras", number, "--max-cpu-loras", number]
    if "lora_target_modules" in arguments:
        words += ["--lora-target-modules", *arguments["lora_target_modules"]]
    return [*words, "--lora-modules", *(f"{name}={folder}" for name, folder in served.adapters)]


def _gpu_flags(config: ServeConfig, served: Served) -> list[str]:
    number = config.tensor_parallel_size or _choose_parallel(config, served)
    if number > torch.cuda.device_count():
        raise ConfigError(
            f"`tensor_parallel_size` is {number}, and this machine has {torch.cuda.device_count()} GPUs",
            "give a smaller one",
        )
    return [
        "--gpu-memory-utilization",
        str(config.gpu_memory_utilization),
        "--tensor-parallel-size",
        str(number),
    ]


def _choose_parallel(config: ServeConfig, served: Served) -> int:
    """Return as few GPUs as the weights fit on, of those numbers that divide the attention's heads."""
    ready = served.ready[0]
    dtype: torch.dtype = getattr(torch, choose_dtype(config.dtype, ready.tuned, True))
    model = build_meta_model(ready.loaded, ready.model_config)
    num_bytes = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    room = torch.cuda.get_device_properties(0).total_memory * config.gpu_memory_utilization
    needed = math.ceil(num_bytes / (room * _SHARE_FOR_WEIGHTS))
    heads = ready.model_config.get_text_config().num_attention_heads
    possible = [n for n in range(1, torch.cuda.device_count() + 1) if heads % n == 0]
    return next((n for n in possible if n >= needed), possible[-1])


def _cpu_flags(served: Served, dtype: str, max_model_len: int) -> list[str]:
    # vLLM's CPU kernels (0.32) put the adapter on base requests that share a step with tuned ones.
    number = 1 if served.adapters else _CPU_SEQUENCES
    text_config = served.ready[0].model_config.get_text_config()
    words = ["--enforce-eager", "--max-num-seqs", str(number)]
    if served.adapters:
        words += ["--max-num-batched-tokens", str(_CPU_TOKENS_A_STEP)]
    return [*words, "--kv-cache-memory-bytes", str(cache_bytes(text_config, dtype, max_model_len, number))]


def _generation_config(served: Served) -> dict[str, Any]:
    """Return what vLLM reads of the model's own generation config, with every token that ends a trained answer."""
    content = read_generation_config(served.model)
    read = {name: content[name] for name in _SAMPLING if content.get(name) is not None}
    return {**read, "eos_token_id": served.stop_token_ids}
