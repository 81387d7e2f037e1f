"""What a run attends with, known before there are weights: as training will find it of the model at hand."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.compat import can_set_attention, supports_flash_attention
from tunesmith.config import TrainConfig
from tunesmith.model.attention_choice import choose_attention, may_use_varlen
from tunesmith.model.kernels.attention import VARLEN, VARLEN_ON_TRIAL, Trial, compute_logits
from tunesmith.model.load import attention_of, narrowest_window
from tunesmith.planning.dry_run import attend_with, make_batch, one_block_of_each_kind, told_beforehand
from tunesmith.planning.live_bytes import AnswersNo

# Of an example: no more than any window.
_FEW_TOKENS = 2


def own_attention(
    model: Any, built_with: str, config: TrainConfig, device_type: str, dtype: torch.dtype
) -> str:
    """Return the backend that the model will be loaded with; `built_with` is transformers' own choice."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    chosen = choose_attention(
        model.config,
        device_type,
        dtype.itemsize == 2,
        config.attn_implementation,
        lambda: supports_flash_attention(base),
    )
    return chosen or built_with


def find_attention(model: Any, own: str, config: TrainConfig, device_type: str, dtype: torch.dtype) -> str:
    """Return the backend that a run of the meta model attends with: `varlen` if nothing speaks against it, else its `own`.

    Raises:
        ModelError: the model can't be run without data.
    """
    # The kernel for GPUs computes in nothing longer.
    computes = device_type == "cpu" or dtype.itemsize == 2
    may = may_use_varlen(config.attn_implementation, own) and computes
    return VARLEN if may and _allows_varlen(model, config.max_seq_length) else own


def _allows_varlen(model: Any, max_seq_length: int) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not can_set_attention(base):
        return False
    built_with, trial = attention_of(base), Trial()
    with told_beforehand(model), one_block_of_each_kind(model), AnswersNo(), torch.no_grad():
        attend_with(model, VARLEN_ON_TRIAL)
        try:
            compute_logits(model, make_batch(_FEW_TOKENS, _FEW_TOKENS, is_flat=True), trial)
        finally:
            attend_with(model, built_with)
    window = narrowest_window(model)
    # Some models mask what lies before a window, and don't hand on how wide it is.
    return not trial.problems and (max_seq_length <= window or window in trial.windows)
