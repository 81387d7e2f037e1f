"""Dropout by token: what of a token is dropped follows from its key and the layer alone, so nothing of it is kept.

Neither its neighbours in the batch nor the device change it. The backward pass draws again.

Shapes: B sequences, T tokens, N = B·T, or fewer where a layer takes fewer; D inputs; E a mask's bytes, one for 8
elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.data.draws import as_keys, mix

# As wide as the numbers whose bits they multiply.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# No layer's input is wider.
_MOST_COLUMNS = 2**18
# The number of the first layer that is dropout and nothing else; adapted layers are counted from 0.
_FIRST_ALONE = 2**20


class _Keys(NamedTuple):
    """What dropout follows from: of the microbatch's tokens, and of the columns of any layer, (2, W); int32."""

    of_tokens_BT: Tensor
    of_columns_2W: Tensor


class _Microbatch:
    """What is trained on now. A context variable isn't seen by the threads that compute blocks again on GPUs."""

    keys: _Keys | None = None


_microbatch = _Microbatch()


@contextmanager
def drawing_from(keys_BT: Tensor | None) -> Iterator[None]:
    """Let dropout follow from the tokens' keys, until the backward pass is done; None: from torch's generator."""
    # Made outside what is compiled, which would make them anew for each element.
    keys = None if keys_BT is None else _Keys(keys_BT, make_column_keys(keys_BT.device))
    with _drawing_from(keys):
        yield


@contextmanager
def drawing_at(positions_N: Tensor) -> Iterator[None]:
    """Let a layer that takes the tokens at these of the flattened positions, as (1, N, D), draw as these tokens do."""
    keys = _microbatch.keys
    if keys is not None:
        keys = keys._replace(of_tokens_BT=keys.of_tokens_BT.flatten()[positions_N].unsqueeze(0))
    with _drawing_from(keys):
        yield


@contextmanager
def _drawing_from(keys: _Keys | None) -> Iterator[None]:
    before, _microbatch.keys = _microbatch.keys, keys
    try:
        yield
    finally:
        _microbatch.keys = before


class TokenDropout(NamedTuple):
    """Follows from the keys of tokens, columns and the layer, a scalar: as one, blocks can share compiled code.

    Multiply-add hashing: the upper bits of (factor · key + offset) modulo 2³² tell, of which any two are independent.
    Factors are odd, and random for each layer and column; offsets for each column.
    """

    keys_BT: Tensor
    columns_2W: Tensor
    layer: Tensor

    def draw(self, values_ND: Tensor, share: float) -> Tensor:
        """Return which of the values are kept: bool, (N, D)."""
        factors_D, offsets_D = self.columns_2W[:, : values_ND.shape[1]]
        drawn_ND = torch.addcmul(
            offsets_D, self.keys_BT.flatten().unsqueeze(1), (factors_D ^ self.layer).bitwise_or(1)
        )
        return drawn_ND >= round(share * 2**32) - 2**31


class KeptDropout(NamedTuple):
    """A mask that was drawn from torch's generator: bool, or the bits of `_draw_packed`."""

    mask: Tensor

    def draw(self, values_ND: Tensor, share: float) -> Tensor:
        """Return which of the values are kept: bool or int8, (N, D)."""
        if self.mask.dtype is torch.bool:
            return self.mask.view_as(values_ND)
        kept_8E = (self.mask >> _bits(self.mask)).bitwise_and_(1)
        return kept_8E.flatten()[: values_ND.numel()].view_as(values_ND)


Dropout = TokenDropout | KeptDropout


def find_dropout(values: Tensor, share: float, layer: Tensor, packs: bool) -> Dropout:
    """Return what drops `share` of `values` in the layer of this key: by token, where they are a row for each token.

    Else a mask is drawn, with `packs` as bits.
    """
    by_token = _find_by_token(values, layer)
    if by_token is not None:
        return by_token
    if packs and not torch.compiler.is_compiling():
        return KeptDropout(_draw_packed(values, share))
    return KeptDropout(torch.empty_like(values, dtype=torch.bool).bernoulli_(1 - share))


def _find_by_token(values: Tensor, layer: Tensor) -> TokenDropout | None:
    keys = _microbatch.keys
    if keys is None or values.shape[-1] > _MOST_COLUMNS:
        return None
    of_tokens_BT = keys.of_tokens_BT
    if values.shape[:-1] not in (of_tokens_BT.shape, (of_tokens_BT.numel(),)):
        return None
    return TokenDropout(*keys, layer)


def drop(values: Tensor, kept: Tensor | None) -> Tensor:
    """Return `values`, zero where they aren't `kept` (None: all are)."""
    if kept is None:
        return values
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        # Integers of mixed widths multiply much faster than a number and a bool.
        return (values.view(_INTEGERS[values.itemsize]) * kept.view(torch.int8)).view(values.dtype)
    return torch.where(kept.bool(), values, 0)


def add_dropped(total: Tensor, values: Tensor, kept: Tensor) -> None:
    """Add to `total` those of `values` that are `kept`."""
    total += drop(values, kept)


def install_dropout(model: nn.Module) -> None:
    """Let torch's own dropout layers in `model` drop by token, where they are given a row for each."""
    layers: list[Any] = [m for m in model.modules() if type(m) is nn.Dropout and m.p > 0]
    for number, layer in enumerate(layers, start=_FIRST_ALONE):
        layer.forward = _DropoutLayer(layer, make_layer_key(number)).forward


@dataclass
class _DropoutLayer:
    layer: Any
    key: Tensor

    def forward(self, values: Tensor) -> Tensor:
        dropout = _find_by_token(values, self.key) if self.layer.training else None
        if dropout is None:
            output: Tensor = type(self.layer).forward(self.layer, values)
        else:
            output = _Dropped.apply(values, dropout, self.layer.p)
        return output


class _Dropped(torch.autograd.Function):
    """The values that are kept, divided by their share, of which the backward pass needs nothing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dropout: TokenDropout, share: float) -> Tensor:
        ctx.save_for_backward(*dropout)
        ctx.share = share
        kept_ND = dropout.draw(values.flatten(0, -2), share)
        return drop(values, kept_ND.view_as(values)).mul_(1 / (1 - share))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        kept_ND = TokenDropout(*ctx.saved_tensors).draw(gradient.flatten(0, -2), ctx.share)
        return drop(gradient, kept_ND.view_as(gradient)).mul_(1 / (1 - ctx.share)), None, None


def _draw_packed(values: Tensor, share: float) -> Tensor:
    """Return the bits of a mask, (E,) int8, for CPUs, which draw numbers slowly: each one is for four elements.

    The share is rounded to a multiple of 2⁻¹⁶.
    """
    num_bytes = -(-values.numel() // 8)
    words = torch.empty(2 * num_bytes, dtype=torch.int64, device=values.device).random_(-(2**63), None)
    drawn_8E = words.view(torch.int16).view(8, num_bytes)
    kept_8E = torch.empty_like(drawn_8E, dtype=torch.int8)
    torch.ge(drawn_8E, round(share * 2**16) - 2**15, out=kept_8E)
    return (kept_8E << _bits(values)).sum(0, dtype=torch.int8)


def make_layer_key(number: int) -> Tensor:
    """Return what the dropout of the layer of this number follows from, an int32 scalar on the CPU."""
    return _make_keys(np.array([number]))[0]


@lru_cache(maxsize=8)
def make_column_keys(device: torch.device) -> Tensor:
    """Return what the dropout of columns follows from, int32, (2, W): a factor and an offset for each."""
    return _make_keys(np.arange(2 * _MOST_COLUMNS).reshape(2, -1)).to(device)


def _make_keys(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(as_keys(mix(np.uint64(0), numbers)))


def _bits(values: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.int8, device=values.device).unsqueeze(1)
