"""What stands for attention on tensors without data: it makes and keeps what the real one does on a device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from tunesmith.model.attention_choice import SDPA, is_flash
from tunesmith.model.kernels.attention import VARLEN

# What begins with `varlen` is told where examples begin.
_STAND_INS = {
    (VARLEN, "cuda"): f"{VARLEN}_planned_on_gpu",
    (SDPA, "cpu"): f"{SDPA}_planned_on_cpu",
    (SDPA, "cuda"): f"{SDPA}_planned_on_gpu",
}


def name_stand_in(attention: str, device_type: str) -> str:
    """Return the name of what stands for a backend on devices of this type: itself where it can be run without data."""
    if is_flash(attention) or attention.startswith("flex"):
        attention = VARLEN  # which keeps as much
    return _STAND_INS.get((attention, device_type), attention)


def _attend_as_a_gpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    return _FlashAttention.apply(query, key, value), None


class _FlashAttention(torch.autograd.Function):
    """What FlashAttention keeps for its backward pass, and makes there. Shapes: (1, heads, tokens, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors[:3])


def _attend_with_sdpa(device_type: str, *args: Any, **options: Any) -> Any:
    # Entered here, as a block that is recomputed would lose it.
    with _FusedAttention(device_type):
        return AttentionInterface()[SDPA](*args, **options)


class _FusedAttention(TorchFunctionMode):
    """Takes torch's SDPA for one of its fused kernels wherever the device has one: without data it keeps squares."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._on_gpu = device_type != "cpu"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._is_fused(*args, **kwargs):
            return _attend_fused(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_fused(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, dropout_p: float = 0.0, **__: Any
    ) -> bool:
        # The CPU's kernel has no dropout, and heads of one width.
        return self._on_gpu or (not dropout_p and query.shape[-1] == value.shape[-1])


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)  # what is added to the scores
    output: Tensor = _FusedKernel.apply(query, key, value, attn_mask)
    return output


class _FusedKernel(torch.autograd.Function):
    """What a fused kernel of SDPA keeps for its backward pass, and makes there. Shapes: (batch, heads, tokens, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:3], value.shape[3])
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp, mask)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(states) for states in ctx.saved_tensors[:3]), None


_ATTEND: dict[tuple[str, str], Any] = {
    (VARLEN, "cuda"): _attend_as_a_gpu,
    (SDPA, "cpu"): partial(_attend_with_sdpa, "cpu"),
    (SDPA, "cuda"): partial(_attend_with_sdpa, "cuda"),
}
for key, name in _STAND_INS.items():
    AttentionInterface.register(name, _ATTEND[key])
    if key[0] == SDPA:
        AttentionMaskInterface.register(name, AttentionMaskInterface()[SDPA])
