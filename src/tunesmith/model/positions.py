"""How many positions a model can tell apart: a table's rows are the end of it, rotary angles are not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(^|[._])(wpe|pos(ition|itions|itional)?)([._]|$)")
_RELATIVE = re.compile(r"relative|bias|rotary|rel_")
# Some tables begin with a few rows that no position means.
_MOST_OFFSET = 8


def find_position_limit(model: PreTrainedModel) -> int | None:
    """Return the positions that the model's table of them holds; None where there is none, as with rotary ones.

    The model may be on the meta device.
    """
    found = list(_position_tables(model))
    return min(found) if found else None


def check_length(model: PreTrainedModel, length: int, setting: str, called: str) -> None:
    """Refuse a `setting` of more tokens than the model's table of positions has; warn beyond its other positions.

    `model` may be on the meta device; `called` is what to call it.

    Raises:
        ConfigError: it names the longest that the model takes.
    """
    limit = find_position_limit(model)
    if limit is not None and length > limit:
        raise ConfigError(
            f"`{setting}` is {length}, and `{called}` has a table of {limit} positions: it can't take longer sequences",
            f"give --{setting} {limit}, or less",
        )
    longest = named_positions(model.config)
    if limit is None and longest is not None and length > longest:
        logger.warning(
            "`%s` is %d, but `%s` was made for %d positions: what is longer goes beyond them",
            setting,
            length,
            called,
            longest,
        )


def named_positions(model_config: PretrainedConfig) -> int | None:
    """Return the positions that the model was made for, by its config; None if that doesn't say."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _position_tables(model: PreTrainedModel) -> Iterator[int]:
    """Yield the positions of each table that text goes through."""
    from torch import nn

    decoder = model.get_decoder() or model
    tokens = model.get_input_embeddings()
    named = named_positions(model.config)
    if hasattr(decoder, "build_mpt_alibi_tensor"):  # as long as its config says, anew in each forward
        yield model.config.max_seq_len
    for name, module in decoder.named_modules():
        if module is tokens or _RELATIVE.search(name):
            continue
        if isinstance(module, nn.Embedding):
            num_rows = module.weight.shape[0]
            if _NAME.search(name) or (_is_near(num_rows, named) and num_rows != tokens.weight.shape[0]):
                yield num_rows - _offset_of(module)
        elif not hasattr(module, "make_weights"):  # sinusoids that grow with what they are asked for
            for own, tensor in _own_tensors(module):
                if _NAME.search(own) and tensor.dim() >= 2 and _is_near(tensor.shape[-2], named):
                    yield tensor.shape[-2]


def _own_tensors(module: object) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)  # type: ignore[attr-defined]
    yield from module.named_buffers(recurse=False)  # type: ignore[attr-defined]


def _is_near(num_rows: int, named: int | None) -> bool:
    return named is not None and named <= num_rows <= named + _MOST_OFFSET


def _offset_of(table: object) -> int:
    """Return the rows that no position means: RoBERTa counts from behind its padding token, OPT's table says it."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1
