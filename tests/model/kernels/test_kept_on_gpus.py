"""What a block keeps for its backward pass the way that GPUs compute it, counted on tensors without data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from tunesmith.compat import storage_key
from tunesmith.config import TrainConfig
from tunesmith.model.kernels.install import GPU, Kernels, install_kernels
from tunesmith.planning.dry_run import attend_with
from tunesmith.planning.memory import build_planned_model
from tunesmith.planning.stand_ins import name_stand_in

NUM_TOKENS, WIDTH, INNER, NUM_BLOCKS = 64, 32, 96, 3


def build() -> Any:
    shape = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return build_planned_model(TrainConfig(lora_rank=4, lora_dropout=0), shape, torch.bfloat16).model


def kept_bytes(kernels: Kernels) -> int:
    """Return the bytes that are saved for the backward pass of all blocks, the weights' own left out."""
    model = build()
    install_kernels(model, kernels)
    attend_with(model, name_stand_in(kernels.attention, "cuda"))
    weights = {storage_key(p.untyped_storage()) for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        kept[storage_key(saved.untyped_storage())] = saved
        return saved

    embedded = torch.empty(1, NUM_TOKENS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        output = model.get_base_model().model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(saved.untyped_storage().nbytes() for key, saved in kept.items() if key not in weights)


def test_neither_normed_states_nor_gated_products_are_kept() -> None:
    """Per token and block: what both norms give, and the product of gate and up, in bfloat16."""
    kernels = replace(GPU, torch_norms=False)  # without data torch's keep more than on a GPU
    saved = kept_bytes(replace(kernels, keeps_cheap_results=True)) - kept_bytes(kernels)
    assert saved == NUM_BLOCKS * NUM_TOKENS * (2 * WIDTH + INNER) * 2


def test_torch_s_norms_are_computed_again_too() -> None:
    """Their inputs are kept in place of what they give: without data they keep a copy in float32 of their own."""
    saved = kept_bytes(replace(GPU, keeps_cheap_results=True)) - kept_bytes(GPU)
    assert saved == NUM_BLOCKS * NUM_TOKENS * INNER * 2
