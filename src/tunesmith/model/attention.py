"""Attention inside each example of a packed row, without a mask: the attention backend `varlen`.

transformers' own backends build a square mask for packed rows and compute what it hides. Here the row is cut
into its examples: FlashAttention's variable-length kernels do it on GPUs, one product per example on CPUs.

Shapes: H heads, K of them for keys and values, T tokens of the row, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.data.batches import Batch

VARLEN = "varlen"

# Tokens of an example up to which its squares are cheaper to keep than to compute again.
LONGEST_SQUARE = 512

# What some models change about the scores, which no kernel here computes.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

_trial: list[str] | None = None


def compute_logits(model: Any, batch: Batch) -> Tensor:
    """Return the model's logits, with its attention backend told of the batch's examples."""
    told: dict[str, Any] = {}
    if model.config._attn_implementation == VARLEN:
        told = {
            "cu_seq_lens_q": batch.starts,
            "cu_seq_lens_k": batch.starts,
            "max_length_q": batch.longest,
            "max_length_k": batch.longest,
        }
    logits: Tensor = model(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False, **told
    ).logits
    return logits


def attend_within_examples(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return causal attention of shape (1, T, H, D), each example of the row for itself.

    `cu_seq_lens_q` holds where the examples begin, and T: int32, on the query's device.

    Raises:
        NotImplementedError: the model's attention has a part that these kernels lack; not while it is tried.
    """
    try:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        extras = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
        if cu_seq_lens_q is None or max_length_q is None or len(query_1HTD) != 1:
            raise NotImplementedError("the model doesn't say where examples begin")
        if extras or dropout or not causal:
            raise NotImplementedError(
                f"{type(module).__name__} asks for {extras}, dropout {dropout}, {causal=}"
            )
        if sliding_window is not None and sliding_window < max_length_q:
            raise NotImplementedError(
                f"an example of {max_length_q} tokens, and a window of {sliding_window}"
            )
        if query_1HTD.shape[-1] != value_1KTD.shape[-1] or (query_1HTD.is_cuda and query_1HTD.itemsize != 2):
            raise NotImplementedError(
                f"heads of {query_1HTD.shape} and {value_1KTD.shape}, {query_1HTD.dtype}"
            )
        attend = _attend_on_gpu if query_1HTD.is_cuda else _attend_on_cpu
        scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query_1HTD, key_1KTD, value_1KTD, scale, cu_seq_lens_q, max_length_q), None
    except (NotImplementedError, TypeError, RuntimeError) as error:
        if _trial is None:
            raise
        _trial.append(str(error))
        return query_1HTD.new_zeros(1, *query_1HTD.shape[2:0:-1], value_1KTD.shape[-1]), None


@contextmanager
def trying() -> Iterator[list[str]]:
    """Let the attention inside give zeros where it can't compute, and yield the list of reasons.

    An error would leave FSDP in the middle of a forward.
    """
    global _trial
    _trial = []
    try:
        yield _trial
    finally:
        _trial = None


def _attend_on_gpu(
    query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, scale: float, starts: Tensor, longest: int
) -> Tensor:
    import torch.nn.attention.varlen

    # Its arguments differ between torch's versions; a type checker knows one of them.
    varlen_attn: Any = torch.nn.attention.varlen.varlen_attn
    states = [states_1HTD[0].transpose(0, 1) for states_1HTD in (query_1HTD, key_1KTD, value_1KTD)]
    grouped = {"enable_gqa": True} if query_1HTD.shape[1] != key_1KTD.shape[1] else {}
    output_THD: Tensor = varlen_attn(
        *states, starts, starts, longest, longest, scale=scale, window_size=(-1, 0), **grouped
    )
    return output_THD.unsqueeze(0)


def _attend_on_cpu(
    query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, scale: float, starts: Tensor, longest: int
) -> Tensor:
    lengths = starts.diff().tolist()
    if longest <= LONGEST_SQUARE:
        attended: Tensor = _SquareAttention.apply(query_1HTD, key_1KTD, value_1KTD, lengths, scale)
        return attended
    # Grouped heads would take torch's slow path.
    groups = query_1HTD.shape[1] // key_1KTD.shape[1]
    states = (query_1HTD, key_1KTD.repeat_interleave(groups, 1), value_1KTD.repeat_interleave(groups, 1))
    outputs = [
        F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        for query, key, value in zip(*(whole.split(lengths, 2) for whole in states), strict=True)
    ]
    return torch.cat(outputs, 2).transpose(1, 2)


class _SquareAttention(torch.autograd.Function):
    """Causal attention of short examples, with their squares of probabilities kept: half the time of torch's own.

    The G heads that share keys are laid one below the other: one product serves them all.
    """

    @staticmethod
    def forward(
        ctx: Any, query_1HTD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, lengths: list[int], scale: float
    ) -> Tensor:
        (num_heads, _, width), num_groups = query_1HTD.shape[1:], key_1KTD.shape[1]
        output_THD = query_1HTD.new_empty(query_1HTD.shape[2], num_heads, width)
        probabilities = []
        for rows in _spans(lengths):
            length = rows.stop - rows.start
            query_KSD = query_1HTD[0, :, rows].reshape(num_groups, -1, width)
            scores_KSt = torch.bmm(query_KSD.float(), key_1KTD[0, :, rows].float().transpose(1, 2)).mul_(
                scale
            )
            scores_KSt.view(-1, length, length).masked_fill_(_future(length), -torch.inf)
            square_KSt = torch.softmax(scores_KSt, -1).to(query_1HTD.dtype)
            output_KSD = torch.bmm(square_KSt, value_1KTD[0, :, rows])
            output_THD[rows] = output_KSD.view(num_heads, length, width).transpose(0, 1)
            probabilities.append(square_KSt)
        ctx.save_for_backward(query_1HTD, key_1KTD, value_1KTD, *probabilities)
        ctx.lengths, ctx.scale = lengths, scale
        return output_THD.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient_1THD: Tensor) -> tuple[Tensor | None, ...]:
        query_1HTD, key_1KTD, value_1KTD, *probabilities = ctx.saved_tensors
        num_heads, num_groups, width = query_1HTD.shape[1], key_1KTD.shape[1], query_1HTD.shape[3]
        gradients = [torch.empty_like(states) for states in (query_1HTD, key_1KTD, value_1KTD)]
        for rows, square_KSt in zip(_spans(ctx.lengths), probabilities, strict=True):
            of_output_KSD = gradient_1THD[0, rows].transpose(0, 1).reshape(num_groups, -1, width)
            query_KSD = query_1HTD[0, :, rows].reshape(num_groups, -1, width)
            of_square = torch.bmm(of_output_KSD, value_1KTD[0, :, rows].transpose(1, 2)).float()
            of_scores = torch._softmax_backward_data(of_square, square_KSt.float(), -1, torch.float32)
            of_scores_KSt = of_scores.mul_(ctx.scale).to(query_1HTD.dtype)
            of_query_KSD = torch.bmm(of_scores_KSt, key_1KTD[0, :, rows])
            gradients[0][0, :, rows] = of_query_KSD.view(num_heads, -1, width)
            gradients[1][0, :, rows] = torch.bmm(of_scores_KSt.transpose(1, 2), query_KSD)
            gradients[2][0, :, rows] = torch.bmm(square_KSt.transpose(1, 2), of_output_KSD)
        return *gradients, None, None


def _spans(lengths: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(lengths))
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


@lru_cache(maxsize=512)
def _future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu_(1)


AttentionInterface.register(VARLEN, attend_within_examples)
