"""Cross-entropy at the trained positions only.

Shapes: B sequences, T tokens, N trained positions, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.model.kernels.attention import compute_logits

# Logits that are held at a time, and of those in float32. CPU: what glibc's allocator keeps when it is freed
# (32 MiB), and what the caches hold; GPU: what keeps it busy.
LOGITS_AT_A_TIME = {"cpu": (1 << 24, 1 << 19), "cuda": (1 << 27, 1 << 27)}


def sum_cross_entropy(model: Any, batch: Batch, fused: bool = False) -> Tensor:
    """Return the summed cross-entropy of the batch's N targets, in nats, float32; zero where N is 0.

    The hidden states are narrowed to the trained positions before the output layer, so that prompt
    positions cost no logits; what the model does with its logits (scales, caps) still applies. With `fused`,
    the N × V logits are never held whole either: for models of which `can_fuse_loss` holds.

    Under FSDP every rank must call it equally often.
    """
    head = model.get_output_embeddings()
    forward = head.forward

    def narrow(hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD.flatten(0, 1).index_select(0, batch.positions_N)

    def narrow_logits(hidden_BTD: Tensor) -> Tensor:
        logits_1NV: Tensor = forward(narrow(hidden_BTD).unsqueeze(0))
        return logits_1NV

    def compute_loss(hidden_BTD: Tensor) -> Tensor:
        loss_sum_111: Tensor = _LinearCrossEntropy.apply(
            narrow(hidden_BTD), head.weight, head.bias, batch.targets_N, batch.input_ids_BT.numel()
        )
        return loss_sum_111

    # Inside the model's forward: there FSDP has the weights whole.
    with _forward_replaced(head, compute_loss if fused else narrow_logits):
        outputs = compute_logits(model, batch)
    if fused:
        return outputs.squeeze()
    return F.cross_entropy(outputs[0].float(), batch.targets_N, reduction="sum")


@torch.no_grad()
def can_fuse_loss(model: Any, batch: Batch, tolerance: float) -> bool:
    """Return whether the model's output layer is plain, and its product left as it is.

    Where the model scales or caps its logits, the fused loss of the batch is not the plain one's. Collective under
    FSDP.
    """
    if not has_plain_head(model):
        return False
    plain, fused = (float(sum_cross_entropy(model, batch, way)) for way in (False, True))
    return abs(plain - fused) <= tolerance * plain


def has_plain_head(model: Any) -> bool:
    """Return whether the output layer is a linear layer without an adapter."""
    return type(model.get_output_embeddings()) is nn.Linear


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of `hidden @ weight.T + bias`; its gradients are made on the way, slice by slice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        most_targets: int,
    ) -> Tensor:
        # The shape of logits: the model passes it on as such.
        loss_sum = torch.zeros((1, 1, 1), dtype=torch.float32, device=hidden_ND.device)
        # Those of the weights are sums over slices, in float32.
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        gradient_ND = torch.empty_like(hidden_ND) if of_hidden else None
        gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if of_weight else None
        gradient_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and of_bias else None
        most_logits, most_wide = LOGITS_AT_A_TIME[hidden_ND.device.type]
        size = min(max(1, most_logits // len(weight_VD)), most_targets)
        # Of one size whatever N, and taken once: allocators would scatter what lives on between slices of many sizes.
        logits_sV = hidden_ND.new_empty(size, len(weight_VD))
        wide_size = min(max(1, most_wide // len(weight_VD)), size)
        wide_2wV = hidden_ND.new_empty((2, wide_size, len(weight_VD)), dtype=torch.float32)
        for rows in _cut(len(hidden_ND), size):
            logits_nV = torch.mm(hidden_ND[rows], weight_VD.T, out=logits_sV[: len(hidden_ND[rows])])
            if bias_V is not None:
                logits_nV += bias_V
            for part in _cut(len(logits_nV), wide_size):
                loss_sum += _lose(logits_nV[part], targets_N[rows][part], wide_2wV, any(ctx.needs_input_grad))
            # From here on they are their own gradient.
            if gradient_ND is not None:
                torch.mm(logits_nV, weight_VD, out=gradient_ND[rows])
            if gradient_VD is not None:
                gradient_VD += logits_nV.T @ hidden_ND[rows]
            if gradient_V is not None:
                gradient_V += logits_nV.sum(0, dtype=torch.float32)
        ctx.save_for_backward(gradient_ND, gradient_VD, gradient_V)
        ctx.dtype = hidden_ND.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if made is None else (made.float() * gradient.squeeze()).to(ctx.dtype)
            for made in ctx.saved_tensors
        )
        return *scaled, None, None


def _lose(logits_nV: Tensor, targets_n: Tensor, wide_2wV: Tensor, differentiate: bool) -> Tensor:
    """Return the summed cross-entropy of logits, computed in float32; put its gradient in their place if asked to."""
    targets_n1 = targets_n.unsqueeze(1)
    wide_nV, log_probabilities_nV = wide_2wV[:, : len(logits_nV)]
    torch.log_softmax(wide_nV.copy_(logits_nV), 1, out=log_probabilities_nV)
    loss_sum: Tensor = -log_probabilities_nV.gather(1, targets_n1).sum()
    if differentiate:
        gradient_nV = log_probabilities_nV.exp_()
        gradient_nV.scatter_add_(1, targets_n1, gradient_nV.new_full(targets_n1.shape, -1.0))
        logits_nV.copy_(gradient_nV)
    return loss_sum


def _cut(num_rows: int, size: int) -> Iterator[slice]:
    """Yield slices of `size` rows."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
