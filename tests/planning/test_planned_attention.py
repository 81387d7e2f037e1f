"""A plan counts what the run will really attend with, and the logits that its loss will really hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.families import EVERY_FAMILY, family_config, family_model
from tunesmith.config import TrainConfig
from tunesmith.model.kernels.install import install_kernels, kernels_for
from tunesmith.model.kernels.loss import sum_cross_entropy
from tunesmith.planning.attention import find_attention, own_attention
from tunesmith.planning.dry_run import attend_with, make_batch, planned_kernels, run_microbatch
from tunesmith.planning.layout import plan_layout
from tunesmith.planning.live_bytes import LiveCounter
from tunesmith.planning.memory import PlannedModel, build_planned_model

LENGTH = 64


def plan_of(family: str, dtype: torch.dtype, config: TrainConfig, **changes: Any) -> PlannedModel:
    return build_planned_model(config, family_config(family, **changes), dtype)


def attention_of(planned: PlannedModel, config: TrainConfig, device_type: str) -> str:
    own = own_attention(planned.model, planned.built_with, config, device_type, planned.dtype)
    return find_attention(planned.model, own, config, device_type, planned.dtype)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_is_planned_for_gpus_too(family: str) -> None:
    config = TrainConfig(lora_rank=4, max_seq_length=LENGTH)
    layout, memory = plan_layout(plan_of(family, torch.bfloat16, config), config, "cuda", 1, 1 << 40)
    assert memory.activations > 0
    assert memory.logits > 0
    assert layout.num_blocks == (1 if family == "biogpt" else 2)  # it doesn't say what its blocks are


@pytest.mark.parametrize(
    ("family", "changes", "settings", "on_cpu", "on_gpu"),
    [
        ("llama", {}, {}, "varlen", "varlen"),
        ("llama", {}, {"attn_implementation": "sdpa"}, "sdpa", "sdpa"),
        ("llama", {}, {"attn_implementation": "eager"}, "eager", "eager"),
        ("llama", {"attention_dropout": 0.1}, {}, "sdpa", "sdpa"),
        ("llama", {}, {"dtype": "float32"}, "varlen", "sdpa"),
        ("mistral", {}, {}, "varlen", "varlen"),
        ("gemma3", {}, {}, "varlen", "varlen"),
        ("qwen2", {}, {}, "varlen", "varlen"),
        ("cohere2", {}, {}, "varlen", "varlen"),
        ("llama4", {}, {}, "sdpa", "sdpa"),
        ("gemma2", {}, {}, "eager", "eager"),
        ("gemma2", {"attn_logit_softcapping": None, "sliding_window": 512}, {}, "varlen", "varlen"),
        ("gpt2", {}, {}, "sdpa", "sdpa"),
        ("gpt2", {"attn_pdrop": 0.0}, {}, "varlen", "varlen"),
        ("gpt_oss", {}, {}, "eager", "eager"),
        ("bloom", {}, {}, "eager", "eager"),
        ("stablelm", {}, {}, "sdpa", "sdpa"),
    ],
    ids=str,
)
def test_the_planned_attention_is_the_run_s(
    family: str, changes: dict[str, Any], settings: dict[str, Any], on_cpu: str, on_gpu: str
) -> None:
    config = TrainConfig(**{"lora_rank": 4, "max_seq_length": LENGTH, **settings})
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    planned = plan_of(family, dtype, config, **changes)
    assert attention_of(planned, config, "cpu") == on_cpu
    assert attention_of(planned, config, "cuda") == on_gpu


def test_squares_of_scores_are_counted_where_attention_keeps_them() -> None:
    """At 1,024 tokens each of two layers keeps those of four heads; a fused kernel keeps the mask in their place."""
    square = 4 * 1024**2
    activations = {}
    for attention in ("eager", "sdpa"):
        config = TrainConfig(lora_rank=4, max_seq_length=1024, attn_implementation=attention)
        planned = plan_of("llama", torch.float32, config, max_position_embeddings=2048)
        for device_type in ("cpu", "cuda"):
            _, memory = plan_layout(
                planned, config.model_copy(update={"gradient_checkpointing": False}), device_type, 1, 1 << 40
            )
            activations[attention, device_type] = memory.activations
    for device_type in ("cpu", "cuda"):
        assert activations["eager", device_type] > activations["sdpa", device_type] + 5 * square


@pytest.mark.parametrize(
    ("family", "copies"),
    [
        ("gemma2", 3),
        ("cohere", 2),
        ("granite", 2),
        ("llama", 1),
    ],
)
def test_logits_that_a_model_changes_are_counted_whole_as_they_are_made(family: str, copies: float) -> None:
    """Told on tensors without data, and measured on real ones."""
    vocab_size, num_tokens = 20_000, 512
    config = TrainConfig(full_ft=True, max_seq_length=num_tokens)
    planned = plan_of(family, torch.float32, config, vocab_size=vocab_size)
    attention = attention_of(planned, config, "cpu")
    kernels = planned_kernels("cpu", attention)
    told, _ = run_microbatch(planned.model, num_tokens, num_tokens, kernels)

    model = family_model(family, vocab_size=vocab_size).train()
    install_kernels(model, kernels_for("cpu"))
    attend_with(model, attention)
    batch = make_batch(num_tokens, num_tokens, is_flat=True, device_type="cpu")
    with LiveCounter([*model.parameters(), *model.buffers()], "cpu") as measured:
        loss = sum_cross_entropy(model, batch, fused=family == "llama")
    measured_peak = measured.peak
    assert loss.isfinite()

    assert told.loss_peak == pytest.approx(measured_peak, rel=0.02)
    logits = 4 * vocab_size * num_tokens
    assert told.loss_peak - told.activations > (copies - 0.5) * logits
