"""What has to be known of a tuned model before it can be asked, told before any weight is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config import HFDatasetConfig, ModelRef, TunedModelConfig
from tunesmith.data.asking import Questions, questions_for
from tunesmith.data.formats import RenderedRow, RowFormat, format_named
from tunesmith.data.formats.messages import MessagesFormat
from tunesmith.data.formats.text import TextFormat
from tunesmith.data.mixture import dataset_of, recorded_formats, without_tag
from tunesmith.evaluate.base_side import examine_adapter
from tunesmith.evaluate.plan import check_fit, is_recorded
from tunesmith.model.files.tokenizer_files import holds_tokenizer
from tunesmith.model.load import (
    build_meta_model,
    check_weights,
    load_end_tokens,
    load_model_config,
    load_tokenizer,
)
from tunesmith.model.positions import find_position_limit, named_positions
from tunesmith.runs.folder import ORIGIN_FILE, read_versioned_json
from tunesmith.runs.identity import recorded_date
from tunesmith.runs.tuned import TunedModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Rows of the run that tell how its answers begin and end.
_NUM_ROWS = 32
_SETS = ("training", "validation", "test")


@dataclass(frozen=True)
class Ready:
    """A tuned model, and how it is asked.

    `loaded` is the model whose configuration goes with the weights: the base, or a whole tuned one.
    `stop_token_ids` end an answer; `positions` are the tokens that the model has room for, None where it sets no limit,
    `num_known` those that the tuned model has rows for.
    """

    tuned: TunedModel
    loaded: ModelRef
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    row_format: RowFormat
    questions: Questions
    stop_token_ids: tuple[int, ...]
    positions: int | None
    num_known: int


def make_ready(config: TunedModelConfig, tuned: TunedModel, system_prompt: str | None = None) -> Ready:
    """Find everything that is needed to ask a tuned model, and refuse what can't work.

    An empty `system_prompt` asks without one, None with the run's own.

    Raises:
        ConfigError, DataError, ModelError: bad input.
    """
    trusts = config.trust_remote_code or (tuned.base is not None and tuned.base.trust_remote_code)
    loaded = ModelRef(tuned.folder, None, trusts)
    if tuned.kind != "model":
        assert tuned.base is not None, "only a whole model has no base"
        loaded = tuned.base
    model_config = load_model_config(loaded)
    check_weights(loaded)
    model = build_meta_model(loaded, model_config)
    check_fit(tuned, model, tuned.base is not None and is_recorded(tuned, tuned.base))
    num_known = examine_adapter(tuned, model).num_known
    tokenizer = load_tokenizer(loaded, tuned.folder if holds_tokenizer(tuned.folder) else None)
    row_format, settings, rows = _trained_rows(tuned, tokenizer)
    prepared = row_format.with_tokenizer(tokenizer, recorded_date(tuned.params))
    asked_with = settings.system_prompt if system_prompt is None else system_prompt
    questions = questions_for(prepared, tokenizer, rows, asked_with)
    ends = questions.end_tokens | load_end_tokens(loaded, model_config) | {tokenizer.eos_token_id}
    return Ready(
        tuned,
        loaded,
        model_config,
        tokenizer,
        prepared,
        questions,
        # A model's configuration may name tokens that it doesn't have.
        tuple(sorted(token for token in ends if token < num_known)),
        find_position_limit(model) or named_positions(model_config),
        num_known,
    )


def _trained_rows(
    tuned: TunedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[RowFormat, HFDatasetConfig, list[RenderedRow]]:
    """Return the format that the model is asked in, the settings of its data set, and some of that set's rows.

    Of a run's several data sets that is the first that asks something.
    """
    if tuned.params is not None:
        sources = tuned.dataset.sources
        formats = recorded_formats(tuned.params["data"]["row_format"], sources)[
            : len(tuned.dataset.data_sets)
        ]
        number = next((i for i, it in enumerate(formats) if it.name != TextFormat.name), 0)
        if len(formats) > 1:
            name = sources[number].name or sources[number].dataset_name
            logger.info("asking as rows of `%s`, the first of the run's %d data sets", name, len(formats))
        return formats[number], sources[number], list(islice(_rows_of(tuned, number), _NUM_ROWS))
    settings = tuned.dataset
    recorded = _exported_format(tuned.folder)
    if recorded is not None:
        return format_named(recorded, settings), settings, []
    name = MessagesFormat.name if tokenizer.chat_template else TextFormat.name
    how = "with the tokenizer's chat template" if tokenizer.chat_template else "as plain text to go on with"
    logger.info("no run tells how `%s` was trained, so it is asked %s", tuned.folder, how)
    return format_named(name, settings), settings, []


def _rows_of(tuned: TunedModel, number: int) -> Iterator[RenderedRow]:
    """Yield the run's own rows of one data set, as far as they are still there."""
    if tuned.data_dir is None:
        return
    for name in _SETS:
        path: Path = tuned.data_dir / f"{name}.jsonl"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                if dataset_of(row) == number:
                    yield without_tag(row)


def _exported_format(folder: Path) -> str | None:
    """Return the row format of the run that an export came from, as its origin says."""
    if not (folder / ORIGIN_FILE).is_file():
        return None
    name = read_versioned_json(folder / ORIGIN_FILE).get("templates", {}).get("row_format")
    return str(name) if name else None
