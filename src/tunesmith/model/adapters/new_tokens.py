"""Tokens that a run adds to its tokenizer, which its model doesn't have yet."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config import TrainConfig
from tunesmith.model.adapters.prior import count_rows_needed, find_adapter
from tunesmith.model.load import load_tokenizer
from tunesmith.paths import is_file
from tunesmith.runs.base_model import read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a model is given: their ids, and how many tokens there were before them."""

    ids: tuple[int, ...]
    num_before: int


def load_run_tokenizer(config: TrainConfig) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a run trains with: the model's, or the one beside its adapter, with the new tokens.

    Raises:
        ModelError, ConfigError: as `load_tokenizer` says.
    """
    tokenizer = _load_before(config)
    absent = [token for token in config.new_tokens or () if token not in tokenizer.get_vocab()]
    if absent:
        tokenizer.add_special_tokens({"extra_special_tokens": absent}, replace_extra_special_tokens=False)
    return tokenizer


def find_new_tokens(config: TrainConfig) -> NewTokens | None:
    """Return those of `new_tokens` that the tokenizer doesn't have yet; None if there is none.

    Raises:
        ModelError, ConfigError: as `load_tokenizer` says.
    """
    if config.new_tokens is None:
        return None
    before = _load_before(config)
    absent = [token for token in config.new_tokens if token not in before.get_vocab()]
    ids = load_run_tokenizer(config).convert_tokens_to_ids(absent)
    return NewTokens(tuple(ids), len(before)) if absent else None


def tell_known_tokens(config: TrainConfig) -> None:
    """Warn of those of `new_tokens` that the tokenizer has already: they are trained as the rest of the model is."""
    known = set(_load_before(config).get_vocab()).intersection(config.new_tokens or ())
    if known:
        listed = ", ".join(f"`{token}`" for token in config.new_tokens or () if token in known)
        logger.warning(
            "the tokenizer of `%s` has %s already: not new, and passed over", config.model.source, listed
        )


def count_rows_asked(config: TrainConfig) -> int:
    """Return how many rows the embeddings must have for the new tokens, and for those of the adapter to go on from."""
    tokens = find_new_tokens(config)
    rows = max(tokens.ids) + 1 if tokens is not None else 0
    if config.adapter_path is None:
        return rows
    return max(rows, count_rows_needed(read_adapter_config(find_adapter(config.adapter_path))))


def _load_before(config: TrainConfig) -> PreTrainedTokenizerFast:
    beside = _find_beside(config.adapter_path) if config.adapter_path is not None else None
    return load_tokenizer(config.model, beside, config.chat_template)


def _find_beside(adapter: Path) -> Path | None:
    folder = find_adapter(adapter)
    return folder if is_file(folder / "tokenizer_config.json") else None
