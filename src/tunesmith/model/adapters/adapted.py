"""From a base model to what is trained of it: an adapter merged in, rows for new tokens, adapters or every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tunesmith.config import TrainConfig
from tunesmith.model.adapters.embeddings import begin_as_mean, grow_embeddings
from tunesmith.model.adapters.lora import add_adapters, merge_into_base
from tunesmith.model.adapters.new_tokens import find_new_tokens
from tunesmith.model.adapters.prior import count_rows_needed, find_adapter
from tunesmith.runs.base_model import read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapt_model(model: PreTrainedModel, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
    """Return what is trained of `model`, which computes in `dtype`; on the meta device, names and shapes alone.

    Raises:
        ConfigError, ModelError: it can't be trained so.
    """
    if config.adapter_path is not None:
        folder = find_adapter(config.adapter_path)
        if config.merge_adapter:
            model = merge_into_base(model, folder)
        else:
            grow_embeddings(model, count_rows_needed(read_adapter_config(folder)))
    tokens = find_new_tokens(config)
    if tokens is not None:
        grow_embeddings(model, max(tokens.ids) + 1)
        begin_as_mean(model, tokens.ids, tokens.num_before)
    for parameter in model.parameters():
        parameter.requires_grad_(config.full_ft)
    trained: nn.Module = model if config.full_ft else add_adapters(model, config, tokens, dtype)
    return trained
