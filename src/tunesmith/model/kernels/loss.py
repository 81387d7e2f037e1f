"""Cross-entropy at the trained positions only.

Shapes: B sequences, T tokens, N trained positions, V vocabulary, D model width; R tokens that have rows of their own,
in place of the weight's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.data.batches import Batch
from tunesmith.model.head import find_head
from tunesmith.model.kernels.attention import compute_logits
from tunesmith.model.kernels.dropout import drawing_at


class LogitsAtATime(NamedTuple):
    """How many logits the fused loss holds at once, and how many of those in float32.

    Attributes:
        tile: the rows that are held are a multiple of so many.
        in_cache: whether float32 numbers stay in a cache, where one more pass over them costs nothing.
    """

    most: int
    most_wide: int
    tile: int = 1
    in_cache: bool = True


# What glibc's allocator keeps when it is freed (32 MiB), and what the caches hold.
CPU_LOGITS = LogitsAtATime(1 << 24, 1 << 19)
# What keeps it busy, in whole tiles of its products.
GPU_LOGITS = LogitsAtATime(1 << 27, 1 << 27, tile=128, in_cache=False)


def sum_cross_entropy(
    model: Any, batch: Batch, fused: bool = False, at_a_time: LogitsAtATime | None = None
) -> Tensor:
    """Return the summed cross-entropy of the batch's N targets, in nats, float32; zero where N is 0.

    The hidden states are narrowed to the trained positions before the output layer, so that prompt
    positions cost no logits; what the model does with its logits (scales, caps) still applies. With `fused`,
    the N × V logits are never held whole either, but so many as suit the device, or `at_a_time`: for models of
    which `can_fuse_loss` holds.

    Under FSDP every rank must call it equally often.
    """
    if fused:
        return _run(model, batch, _LinearCrossEntropy, at_a_time).squeeze()
    return F.cross_entropy(_run(model, batch)[0].float(), batch.targets_N, reduction="sum")


def token_cross_entropies(
    model: Any, batch: Batch, fused: bool = False, at_a_time: LogitsAtATime | None = None
) -> Tensor:
    """Return the cross-entropy (N) of each of the batch's targets, in nats, float32: otherwise as their sum."""
    if fused:
        return _run(model, batch, _TokenLinearCrossEntropy, at_a_time)[0, :, 0]
    return F.cross_entropy(_run(model, batch)[0].float(), batch.targets_N, reduction="none")


def _run(
    model: Any,
    batch: Batch,
    cross_entropy: type[torch.autograd.Function] | None = None,
    at_a_time: LogitsAtATime | None = None,
) -> Tensor:
    """Return the logits (1, N, V) at the trained positions, or with a `cross_entropy` what it makes in their place."""
    head = find_head(model)
    forward = head.module.forward

    def narrow(hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD.flatten(0, 1).index_select(0, batch.positions_N)

    def narrow_logits(hidden_BTD: Tensor) -> Tensor:
        with drawing_at(batch.positions_N):
            logits_1NV: Tensor = forward(narrow(hidden_BTD).unsqueeze(0))
        return logits_1NV

    def compute_loss(hidden_BTD: Tensor) -> Tensor:
        assert cross_entropy is not None
        loss: Tensor = cross_entropy.apply(
            narrow(hidden_BTD),
            head.layer.weight,
            head.layer.bias,
            *head.rows,
            batch.targets_N,
            batch.input_ids_BT.numel(),
            at_a_time or (CPU_LOGITS if hidden_BTD.device.type == "cpu" else GPU_LOGITS),
        )
        return loss

    # Inside the model's forward: there FSDP has the weights whole.
    with _forward_replaced(head.module, narrow_logits if cross_entropy is None else compute_loss):
        return compute_logits(model, batch)


@torch.no_grad()
def can_fuse_loss(model: Any, batch: Batch) -> bool:
    """Return whether the model's output layer is plain, and its product left as it is: not scaled, capped or masked.

    A few tokens may have rows of their own. In the product's place the model is handed numbers that any change would
    show in. It may be on the meta device, so that this is known before there are weights. Collective under FSDP.
    """
    head = find_head(model)
    if not head.is_plain:
        return False
    device = torch.device("cpu") if batch.input_ids_BT.is_meta else batch.input_ids_BT.device
    # Whole numbers that every dtype holds.
    numbers_11V = (torch.arange(len(head.layer.weight), device=device) % 201 - 100.0).view(1, 1, -1)
    with _forward_replaced(head.module, lambda _: numbers_11V.clone()):
        found = compute_logits(model, batch)
    return found.shape == numbers_11V.shape and torch.equal(found.float(), numbers_11V)


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
        rows_RD: Tensor | None,
        ids_R: Tensor | None,
        targets_N: Tensor,
        most_targets: int,
        at_a_time: LogitsAtATime,
    ) -> Tensor:
        # The shape of logits: the model passes it on as such.
        loss_sum = torch.zeros((1, 1, 1), dtype=torch.float32, device=hidden_ND.device)
        head = _Weights(weight_VD, bias_V, rows_RD, ids_R)
        gradients = _Gradients.make(ctx.needs_input_grad, hidden_ND, head)
        for rows, logits_nV, wide_2wV in _slice_logits(hidden_ND, head, most_targets, at_a_time):
            for part in _cut_wide(logits_nV, wide_2wV):
                log_probs_n1 = _pick(logits_nV[part], targets_N[rows][part], wide_2wV, gradients.are_needed)
                loss_sum -= log_probs_n1.sum()
            gradients.add(rows, logits_nV, hidden_ND, head)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden_ND.dtype
        return loss_sum

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if made is None else (made.float() * gradient.squeeze()).to(ctx.dtype)
            for made in ctx.saved_tensors
        )
        return *scaled, None, None, None, None


class _TokenLinearCrossEntropy(torch.autograd.Function):
    """The cross-entropy of `hidden @ weight.T + bias` at each token.

    A token's gradient by its hidden state is a row of its own: it is made on the way, and scaled in the backward pass.
    The gradients of a trained weight or bias add up tokens, each scaled already: there the backward pass computes the
    logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        rows_RD: Tensor | None,
        ids_R: Tensor | None,
        targets_N: Tensor,
        most_targets: int,
        at_a_time: LogitsAtATime,
    ) -> Tensor:
        # The shape of logits: the model passes it on as such. No view, of which FSDP warns.
        losses_1N1 = torch.empty((1, len(hidden_ND), 1), dtype=torch.float32, device=hidden_ND.device)
        of_hidden, *of_head = ctx.needs_input_grad[:4]
        trains_head = any(of_head)
        needed = (of_hidden and not trains_head, False, False, False)
        head = _Weights(weight_VD, bias_V, rows_RD, ids_R)
        gradients = _Gradients.make(needed, hidden_ND, head)
        for rows, logits_nV, wide_2wV in _slice_logits(hidden_ND, head, most_targets, at_a_time):
            losses_n1, targets_n = losses_1N1[0, rows], targets_N[rows]
            for part in _cut_wide(logits_nV, wide_2wV):
                log_probs_n1 = _pick(logits_nV[part], targets_n[part], wide_2wV, gradients.are_needed)
                torch.neg(log_probs_n1, out=losses_n1[part])
            gradients.add(rows, logits_nV, hidden_ND, head)
        inputs = (hidden_ND, targets_N, *head) if trains_head else ()
        ctx.save_for_backward(gradients.of_hidden_ND, *inputs)
        ctx.sizes = most_targets, at_a_time
        return losses_1N1

    @staticmethod
    def backward(ctx: Any, upstream_1N1: Tensor) -> tuple[Tensor | None, ...]:
        upstream_N1 = upstream_1N1[0]
        gradient_ND, *inputs = ctx.saved_tensors
        if not inputs:
            return (gradient_ND.float() * upstream_N1).to(gradient_ND.dtype), *[None] * 7
        hidden_ND, targets_N, *weights = inputs
        head = _Weights(*weights)
        gradients = _Gradients.make(ctx.needs_input_grad, hidden_ND, head)
        for rows, logits_nV, wide_2wV in _slice_logits(hidden_ND, head, *ctx.sizes):
            targets_n, upstream_n1 = targets_N[rows], upstream_N1[rows]
            for part in _cut_wide(logits_nV, wide_2wV):
                _pick(logits_nV[part], targets_n[part], wide_2wV, True, upstream_n1[part])
            gradients.add(rows, logits_nV, hidden_ND, head)
        of_inputs = (None if made is None else made.to(hidden_ND.dtype) for made in gradients)
        return *of_inputs, None, None, None, None


class _Weights(NamedTuple):
    """What the head multiplies by and adds; `ids_R` are the tokens that have the rows of `rows_RD`."""

    weight_VD: Tensor
    bias_V: Tensor | None
    rows_RD: Tensor | None
    ids_R: Tensor | None


class _Gradients(NamedTuple):
    """The gradients of the head's inputs that are needed; those of what it trains are sums over slices, in float32."""

    of_hidden_ND: Tensor | None
    of_weight_VD: Tensor | None
    of_bias_V: Tensor | None
    of_rows_RD: Tensor | None

    @staticmethod
    def make(needed: Sequence[bool], hidden_ND: Tensor, head: _Weights) -> _Gradients:
        of_hidden, *of_head = needed[:4]
        return _Gradients(
            torch.empty_like(hidden_ND) if of_hidden else None,
            *(
                torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and is_needed else None
                for tensor, is_needed in zip(head[:3], of_head, strict=True)
            ),
        )

    @property
    def are_needed(self) -> bool:
        return any(gradient is not None for gradient in self)

    def add(self, rows: slice, gradient_nV: Tensor, hidden_ND: Tensor, head: _Weights) -> None:
        """Add what follows from the gradient by the logits of these rows."""
        of_own_nD = None
        if head.rows_RD is not None and head.ids_R is not None:
            gradient_nR = gradient_nV[:, head.ids_R]
            of_own_nD = gradient_nR @ head.rows_RD
            if self.of_rows_RD is not None:
                self.of_rows_RD.add_(gradient_nR.T @ hidden_ND[rows])
            gradient_nV.index_fill_(1, head.ids_R, 0)  # the weight's own rows are not in use there
        if self.of_hidden_ND is not None:
            torch.mm(gradient_nV, head.weight_VD, out=self.of_hidden_ND[rows])
            if of_own_nD is not None:
                self.of_hidden_ND[rows] += of_own_nD
        if self.of_weight_VD is not None:
            self.of_weight_VD.add_(gradient_nV.T @ hidden_ND[rows])
        if self.of_bias_V is not None:
            self.of_bias_V.add_(gradient_nV.sum(0, dtype=torch.float32))


def _slice_logits(
    hidden_ND: Tensor, head: _Weights, most_targets: int, at_a_time: LogitsAtATime
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield the logits slice by slice: the rows, their logits, and room for two float32 copies of those in the cache."""
    weight_VD, bias_V, rows_RD, ids_R = head
    most_logits, most_wide, tile, in_cache = at_a_time
    size = min(max(1, most_logits // len(weight_VD) // tile) * tile, most_targets)
    # Of one size whatever N, and taken once: allocators would scatter what lives on between slices of many sizes.
    logits_sV = hidden_ND.new_empty(size, len(weight_VD))
    wide_2wV = None
    if in_cache:
        wide_size = min(max(1, most_wide // len(weight_VD)), size)
        wide_2wV = hidden_ND.new_empty((2, wide_size, len(weight_VD)), dtype=torch.float32)
    for rows in _cut(len(hidden_ND), size):
        logits_nV = torch.mm(hidden_ND[rows], weight_VD.T, out=logits_sV[: len(hidden_ND[rows])])
        if bias_V is not None:
            logits_nV += bias_V
        if rows_RD is not None and ids_R is not None:
            logits_nV.index_copy_(1, ids_R, hidden_ND[rows] @ rows_RD.T)
        yield rows, logits_nV, wide_2wV


def _pick(
    logits_nV: Tensor,
    targets_n: Tensor,
    wide_2wV: Tensor | None,
    differentiate: bool,
    upstream_n1: Tensor | None = None,
) -> Tensor:
    """Return the targets' log-probs (n, 1), computed in float32.

    If asked to, put in the logits' place the gradient of the cross-entropy, times `upstream_n1`.
    """
    targets_n1 = targets_n.unsqueeze(1)
    if wide_2wV is None:
        return _pick_narrowing(logits_nV, targets_n1, differentiate, upstream_n1)
    wide_nV, log_probs_nV = wide_2wV[:, : len(logits_nV)]
    torch.log_softmax(wide_nV.copy_(logits_nV), 1, out=log_probs_nV)
    log_probs_n1: Tensor = log_probs_nV.gather(1, targets_n1)
    if differentiate:
        gradient_nV = log_probs_nV.exp_()
        gradient_nV.scatter_add_(1, targets_n1, gradient_nV.new_full(targets_n1.shape, -1.0))
        if upstream_n1 is not None:
            gradient_nV *= upstream_n1
        logits_nV.copy_(gradient_nV)
    return log_probs_n1


def _pick_narrowing(
    logits_nV: Tensor, targets_n1: Tensor, differentiate: bool, upstream_n1: Tensor | None
) -> Tensor:
    """Do as `_pick`, with gradients that are narrowed to the logits' dtype as they are made."""
    log_probs_nV = torch.log_softmax(logits_nV, 1, dtype=torch.float32)
    log_probs_n1: Tensor = log_probs_nV.gather(1, targets_n1)
    if differentiate:
        of_targets_n1 = log_probs_n1.expm1()
        if upstream_n1 is None:
            torch.exp(log_probs_nV, out=logits_nV)
        else:
            torch.mul(log_probs_nV.exp_(), upstream_n1, out=logits_nV)
            of_targets_n1 *= upstream_n1
        logits_nV.scatter_(1, targets_n1, of_targets_n1.to(logits_nV.dtype))
    return log_probs_n1


def _cut_wide(logits_nV: Tensor, wide_2wV: Tensor | None) -> Iterator[slice]:
    """Yield slices of as many rows as there is room for in float32."""
    return _cut(len(logits_nV), len(logits_nV) if wide_2wV is None else wide_2wV.shape[1])


def _cut(num_rows: int, size: int) -> Iterator[slice]:
    """Yield slices of `size` rows."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
