"""What the tuning did to the base model's own side of a comparison: its vocabulary, and its weights while adapted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.config import ModelRef
from tunesmith.errors import ModelError
from tunesmith.evaluate.test_set import TestSet
from tunesmith.model.adapters.folder import count_rows, leaves_base, read_adapter_shapes
from tunesmith.model.files.state import list_weights
from tunesmith.model.load import load_tokenizer
from tunesmith.model.vocabulary import count_known_tokens
from tunesmith.runs.base_model import read_adapter_config
from tunesmith.runs.tuned import TunedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterEffect:
    """`num_known`: the tokens that the tuned model has rows for. `leaves_base`: an adapter that is turned off leaves
    the base model as it is."""

    num_known: int
    leaves_base: bool


def examine_adapter(tuned: TunedModel, model: PreTrainedModel) -> AdapterEffect:
    """Return what the tuned model's adapter, if it is one, does to `model`: its base, which may be on the meta device."""
    if tuned.kind == "state":  # full fine-tuning too may have grown the embeddings
        found = {name: tuple(weight.shape) for name, weight in list_weights(tuned.folder).items()}
        return AdapterEffect(count_rows(model, found, {}), True)
    if tuned.kind != "adapter":
        return AdapterEffect(count_known_tokens(model), True)
    settings, shapes = read_adapter_config(tuned.folder), read_adapter_shapes(tuned.folder)
    return AdapterEffect(count_rows(model, shapes, settings), leaves_base(model, tuned.folder))


def word_for_base(
    test_set: TestSet, tokenizer: PreTrainedTokenizerFast, base: ModelRef, base_config: PretrainedConfig
) -> Mapping[int, tuple[int, ...]]:
    """Return the prompts that the base model reads in its own tokens, by sample: those with tokens that it lacks.

    Raises:
        ModelError: its tokens are others than the tuned model's.
    """
    known = base_config.get_text_config().vocab_size
    beyond = {n: p.input_ids for n, p in test_set.samples.items() if max(p.input_ids) >= known}
    if not beyond:
        return {}
    own: PreTrainedTokenizerFast | None = None
    with suppress(ModelError):
        own = load_tokenizer(base)
    vocabulary = tokenizer.get_vocab().items()
    if own is None or not own.get_vocab().items() <= vocabulary:
        highest = max(map(max, beyond.values()))
        raise ModelError(
            f"`{base.source}` knows {known:,} tokens, and the prompts of the tuned model use token {highest:,}",
            "give the base model that it was trained on with --model_path or --base_model; or --compare none",
        )
    logger.warning(
        "%d of %d prompts hold tokens that were added to the tuned model's: the base model reads their text in its own",
        len(beyond),
        len(test_set.samples),
    )
    return {number: reword(ids, tokenizer, own) for number, ids in beyond.items()}


def reword(
    ids: tuple[int, ...], tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    """Return the tokens that `other` makes of the text which `ids` are by `tokenizer`."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return tuple(other(text, add_special_tokens=False)["input_ids"])
