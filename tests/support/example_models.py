"""The models of the sized examples, as their configurations on the hub have them, and the nodes they ask for."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, MistralConfig, MixtralConfig, Phi3Config, PretrainedConfig, Qwen3Config

from support.values import EXAMPLES

MODELS = {name: values for name, values in EXAMPLES.items() if values.get("run")}


@dataclass(frozen=True)
class Instance:
    """An instance type of AWS with 8 GPUs, from its data sheet."""

    gpu: str
    gpu_gb: int
    cpus: int
    memory_gib: int
    efa_interfaces: int


INSTANCES = {
    "p4d.24xlarge": Instance("A100", 40, 96, 1152, 4),
    "p4de.24xlarge": Instance("A100", 80, 96, 1152, 4),
    "p5.48xlarge": Instance("H100", 80, 192, 2048, 32),
}
# As in each model's config.json on the hub.
CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen/Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    ),
    "Qwen/Qwen3-14B": Qwen3Config(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
    "mistralai/Mistral-7B-v0.1": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False,
    ),
    "mistralai/Mixtral-8x7B-v0.1": MixtralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2,
    ),
    "mistralai/Mixtral-8x22B-v0.1": MixtralConfig(
        hidden_size=6144, intermediate_size=16384, num_hidden_layers=56, num_attention_heads=48,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2,
    ),
    "microsoft/Phi-3-medium-4k-instruct": Phi3Config(
        hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=10, vocab_size=32064, tie_word_embeddings=False,
    ),
}  # fmt: skip
