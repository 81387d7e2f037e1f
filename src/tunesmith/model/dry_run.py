"""A microbatch on tensors without data: what lives at once in its forward and backward pass.

On torch's meta device every product costs nothing, and every tensor says how many bytes it would hold.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from tunesmith.data.batches import Batch
from tunesmith.model.attention import VARLEN, attend_within_examples
from tunesmith.model.loss import LOGITS_AT_A_TIME, sum_cross_entropy


@dataclass(frozen=True)
class MicrobatchBytes:
    """Bytes that live besides weights and their gradients: before the loss, at most until it is done, at most."""

    activations: int
    loss_peak: int
    peak: int


def measure_microbatch(model: Any, num_tokens: int, example_tokens: int, device_type: str) -> MicrobatchBytes:
    """Return what one microbatch of the meta model holds: `num_tokens` in examples of `example_tokens`."""
    head = model.get_output_embeddings()
    fused_loss = type(head) is nn.Linear and not head.weight.requires_grad
    batch = _make_batch(num_tokens, example_tokens)
    live = _LiveBytes([*model.parameters(), *model.buffers()])
    before_loss: list[int] = []
    handles = [head.register_forward_pre_hook(lambda *_: before_loss.append(live.now))]
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Gradients are counted apart.
            handles.append(parameter.register_post_accumulate_grad_hook(_forget_gradient))
    with _planned_for(model, device_type), live:
        loss = sum_cross_entropy(model, batch, fused_loss)
        loss_peak = live.peak
        loss.backward()
    for handle in handles:
        handle.remove()
    return MicrobatchBytes(before_loss[0], loss_peak, live.peak)


def _make_batch(num_tokens: int, example_tokens: int) -> Batch:
    starts = [*range(0, num_tokens, example_tokens), num_tokens]
    ids_1T = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    # Every token but an example's first is a target; one more costs nothing.
    return Batch(
        ids_1T, ids_1T, ids_1T[0], ids_1T[0], torch.tensor(starts, dtype=torch.int32), example_tokens
    )


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the meta tensors that are made inside and live; views of what was there before are free."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._keys = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.is_meta:
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._keys:
            return
        self._keys.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._keys.remove(key)
        self.now -= size


@contextmanager
def _planned_for(model: Any, device_type: str) -> Iterator[None]:
    """Let meta tensors go the way of `device_type` through attention and loss."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        if device_type == "cpu":
            options["sliding_window"] = None
            return attend_within_examples(module, query, key, value, attention_mask, **options)
        return _FlashAttention.apply(query, key, value), None

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(VARLEN)
    AttentionInterface.register(VARLEN, attend)
    LOGITS_AT_A_TIME["meta"] = LOGITS_AT_A_TIME[device_type]
    try:
        yield
    finally:
        AttentionInterface.register(VARLEN, attend_within_examples)
        del LOGITS_AT_A_TIME["meta"]


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
