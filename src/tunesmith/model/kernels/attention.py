"""Attention inside each example of a packed row, without a mask: the attention backend `varlen`.

transformers' own backends build a square mask for packed rows and compute what it hides. Here the row is cut
into its examples: FlashAttention's variable-length kernels do it on GPUs, products of tiles on CPUs.

Shapes: H heads, K of them for keys and values, T tokens of the row, D head width.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.compat import attention_name, softmax_gradient
from tunesmith.data.batches import Batch
from tunesmith.model.attention_choice import is_flash

VARLEN = "varlen"
VARLEN_ON_TRIAL = "varlen_on_trial"

# Tokens of an example up to which its probabilities are cheaper to keep than to compute again.
LONGEST_KEPT = 512

_TILE = 128
_KEYS_MULTIPLE = 64

# What some models change about the scores, which no kernel here computes.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass
class Trial:
    """What `varlen_on_trial` was asked for.

    Attributes:
        problems: why it could not compute that.
        windows: the layers' `sliding_window`, of those that have one.
    """

    problems: list[str] = field(default_factory=list)
    windows: set[int] = field(default_factory=set)


# The trial that runs, or none: not every model hands on what it is told.
_trial_at_work: ContextVar[Trial | None] = ContextVar("_trial_at_work", default=None)


@contextmanager
def on_trial(trial: Trial | None) -> Iterator[None]:
    """Let what `varlen_on_trial` can't compute be noted in `trial`, if there is one."""
    token = _trial_at_work.set(trial)
    try:
        yield
    finally:
        _trial_at_work.reset(token)


def compute_logits(model: Any, batch: Batch, trial: Trial | None = None) -> Tensor:
    """Return the model's logits, with its attention backend told of the batch's examples; `trial` is noted in."""
    told: dict[str, Any] = {}
    if attention_name(model).startswith(VARLEN) or _is_flash_to_be_told(model, batch):
        told = {
            "cu_seq_lens_q": batch.starts,
            "cu_seq_lens_k": batch.starts,
            "max_length_q": batch.longest,
            "max_length_k": batch.longest,
        }
    with on_trial(trial):
        logits: Tensor = model(
            input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False, **told
        ).logits
    return logits


def _is_flash_to_be_told(model: Any, batch: Batch) -> bool:
    """Return whether transformers' FlashAttention would look in each layer for where the row's examples begin."""
    if not is_flash(attention_name(model)) or len(batch.input_ids_BT) > 1:
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    takes = inspect.signature(type(base).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes)


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

    `cu_seq_lens_q` holds where the examples begin, and T: int32, on the query's device. Of a `sliding_window` of w
    tokens, each sees itself and the w - 1 before it.

    Raises:
        NotImplementedError: the model's attention has a part that these kernels lack.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extras = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if cu_seq_lens_q is None or max_length_q is None or len(query_1HTD) != 1:
        raise NotImplementedError("the model doesn't say where examples begin")
    if extras or dropout or not causal:
        raise NotImplementedError(f"{type(module).__name__} asks for {extras}, dropout {dropout}, {causal=}")
    if query_1HTD.shape[-1] != value_1KTD.shape[-1] or (query_1HTD.is_cuda and query_1HTD.itemsize != 2):
        raise NotImplementedError(f"heads of {query_1HTD.shape} and {value_1KTD.shape}, {query_1HTD.dtype}")
    attend = _attend_on_gpu if query_1HTD.is_cuda else _attend_on_cpu
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window
    return attend(query_1HTD, key_1KTD, value_1KTD, scale, cu_seq_lens_q, max_length_q, window), None


def attend_on_trial(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what `attend_within_examples` does, or NaN where it can't compute that, and note the reason in the trial.

    An error would leave FSDP in the middle of a forward.
    """
    trial = _trial_at_work.get()
    if trial and (window := options.get("sliding_window")):
        trial.windows.add(window)
    try:
        return attend_within_examples(module, query_1HTD, key_1KTD, value_1KTD, attention_mask, **options)
    except (NotImplementedError, TypeError, RuntimeError) as error:
        if trial:
            trial.problems.append(str(error))
        shape = 1, *query_1HTD.shape[2:0:-1], value_1KTD.shape[-1]
        return query_1HTD.new_full(shape, torch.nan), None


def _attend_on_gpu(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    scale: float,
    starts: Tensor,
    longest: int,
    window: int | None,
) -> Tensor:
    import torch.nn.attention.varlen

    # Its arguments differ between torch's versions; a type checker knows one of them.
    varlen_attn: Any = torch.nn.attention.varlen.varlen_attn
    # Not `[0]`, whose gradient is copied into zeros.
    states = [states_1HTD.squeeze(0).transpose(0, 1) for states_1HTD in (query_1HTD, key_1KTD, value_1KTD)]
    is_grouped = query_1HTD.shape[1] != key_1KTD.shape[1]
    grouped = {"enable_gqa": True} if is_grouped and _asks_about_groups() else {}
    tokens_before = -1 if window is None else window - 1
    output_THD: Tensor = varlen_attn(
        *states, starts, starts, longest, longest, scale=scale, window_size=(tokens_before, 0), **grouped
    )
    return output_THD.unsqueeze(0)


# A graph holds the answer: no compiler looks at signatures.
@torch.compiler.assume_constant_result
def _asks_about_groups() -> bool:
    """Return whether torch's kernel wants to be told that heads share keys: from 2.13 on; before, it saw for itself."""
    import torch.nn.attention.varlen

    return "enable_gqa" in inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters


# It cuts rows into examples one by one, which no graph can hold.
@torch.compiler.disable
def _attend_on_cpu(
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    scale: float,
    starts: Tensor,
    longest: int,
    window: int | None,
) -> Tensor:
    tiles = _cut_into_tiles(tuple(starts.diff().tolist()), window)
    attended: Tensor = _TiledAttention.apply(
        query_1HTD, key_1KTD, value_1KTD, tiles, longest <= LONGEST_KEPT, scale
    )
    return attended


class _TiledAttention(torch.autograd.Function):
    """Causal attention within examples, tile by tile of queries, in half of the time of torch's own.

    The G heads that share keys are laid one below the other: one product serves them all. The probabilities
    are kept for the backward pass, or, where they would fill the memory, computed there again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_1HTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        tiles: list[_Tile],
        keeps_probabilities: bool,
        scale: float,
    ) -> Tensor:
        num_heads, num_tokens, width = query_1HTD.shape[1:]
        output_THD = query_1HTD.new_empty(num_tokens, num_heads, width)
        kept: list[Tensor] = []
        for tile in tiles:
            probabilities_KSt = _attend_from(tile, query_1HTD, key_1KTD, scale)
            if keeps_probabilities:
                kept.append(probabilities_KSt)
            output_KSD = torch.bmm(probabilities_KSt, value_1KTD[0, :, tile.keys])
            output_THD[tile.queries] = output_KSD.view(num_heads, -1, width).transpose(0, 1)
        ctx.save_for_backward(query_1HTD, key_1KTD, value_1KTD, *kept)
        ctx.tiles, ctx.scale = tiles, scale
        return output_THD.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient_1THD: Tensor) -> tuple[Tensor | None, ...]:
        query_1HTD, key_1KTD, value_1KTD, *kept = ctx.saved_tensors
        num_heads, num_groups, width = query_1HTD.shape[1], key_1KTD.shape[1], query_1HTD.shape[3]
        of_query_HTD = torch.empty_like(query_1HTD[0])
        of_key_KTD, of_value_KTD = torch.zeros_like(key_1KTD[0]), torch.zeros_like(value_1KTD[0])
        for tile, probabilities_KSt in itertools.zip_longest(ctx.tiles, kept):
            if probabilities_KSt is None:
                probabilities_KSt = _attend_from(tile, query_1HTD, key_1KTD, ctx.scale)
            query_KSD = query_1HTD[0, :, tile.queries].reshape(num_groups, -1, width)
            of_output_KSD = gradient_1THD[0, tile.queries].transpose(0, 1).reshape(num_groups, -1, width)
            of_probabilities_KSt = torch.bmm(of_output_KSD, value_1KTD[0, :, tile.keys].transpose(1, 2))
            of_scores_KSt = softmax_gradient(of_probabilities_KSt, probabilities_KSt)
            of_query_KSD = torch.bmm(of_scores_KSt, key_1KTD[0, :, tile.keys]).mul_(ctx.scale)
            of_query_HTD[:, tile.queries] = of_query_KSD.view(num_heads, -1, width)
            of_key_KTD[:, tile.keys].baddbmm_(of_scores_KSt.transpose(1, 2), query_KSD, alpha=ctx.scale)
            of_value_KTD[:, tile.keys].baddbmm_(probabilities_KSt.transpose(1, 2), of_output_KSD)
        return of_query_HTD.unsqueeze(0), of_key_KTD.unsqueeze(0), of_value_KTD.unsqueeze(0), None, None, None


def _attend_from(tile: _Tile, query_1HTD: Tensor, key_1KTD: Tensor, scale: float) -> Tensor:
    """Return the tile's probabilities, (K, S, t): S queries of G heads, t keys."""
    num_heads, num_groups = query_1HTD.shape[1], key_1KTD.shape[1]
    query_KSD = query_1HTD[0, :, tile.queries].reshape(num_groups, -1, query_1HTD.shape[3])
    key_KDt = key_1KTD[0, :, tile.keys].transpose(1, 2)
    with _bfloat16_products(query_1HTD.dtype == torch.bfloat16):
        # A plan's tensors are on no device.
        hidden_St = tile.hidden_st.to(query_KSD.device).repeat(num_heads // num_groups, 1)
        scores_KSt = torch.baddbmm(hidden_St, query_KSD.float(), key_KDt.float(), alpha=scale)
    return torch.softmax(scores_KSt, -1).to(query_1HTD.dtype)


@dataclass(frozen=True)
class _Tile:
    """Some s queries, the t keys that any of them sees, and -∞ where one doesn't."""

    queries: slice
    keys: slice
    hidden_st: Tensor


# One row's, with a window and without: the layers follow one another.
@lru_cache(maxsize=2)
def _cut_into_tiles(lengths: tuple[int, ...], window: int | None) -> list[_Tile]:
    ends = itertools.accumulate(lengths)
    starts = [end - length for end, length in zip(ends, lengths, strict=True) for _ in range(length)]
    starts_T = torch.tensor(starts)
    positions_T = torch.arange(len(starts))
    tiles = []
    for first in range(0, len(starts), _TILE):
        queries = slice(first, min(first + _TILE, len(starts)))
        # Of a few sizes only: allocators and kernels meet them again.
        first_seen = starts[first] if window is None else max(starts[first], first - window + 1)
        keys = slice(first_seen // _KEYS_MULTIPLE * _KEYS_MULTIPLE, queries.stop)
        sees_st = positions_T[keys] <= positions_T[queries, None]
        sees_st &= positions_T[keys] >= starts_T[queries, None]
        if window is not None:
            sees_st &= positions_T[keys] > positions_T[queries, None] - window
        tiles.append(_Tile(queries, keys, torch.zeros(sees_st.shape).masked_fill_(~sees_st, -torch.inf)))
    return tiles


@contextmanager
def _bfloat16_products(wanted: bool) -> Iterator[None]:
    """Let products of float32 on the CPU round their factors to bfloat16, at several times the speed.

    Factors that were bfloat16 lose nothing by it, and the sums are float32.
    """
    onednn: Any = torch.backends.mkldnn
    before = onednn.matmul.fp32_precision
    if wanted:
        onednn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        onednn.matmul.fp32_precision = before


AttentionInterface.register(VARLEN, attend_within_examples)
AttentionInterface.register(VARLEN_ON_TRIAL, attend_on_trial)
