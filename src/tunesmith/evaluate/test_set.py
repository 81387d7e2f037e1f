"""The samples of an evaluation: test rows as prompts, rendered by the templates that trained the model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import EvaluateConfig, HFDatasetConfig
from tunesmith.data.formats import Findings, Prompt, RenderedRow, RowFormat, choose_format
from tunesmith.data.formats.template import TemplateFormat
from tunesmith.data.mixture import encode_rows, prompt_of, recorded_formats, without_tag
from tunesmith.data.sources import describe_source, local_path, read_rows, source_fingerprint
from tunesmith.data.split import check_other_split
from tunesmith.errors import DataError
from tunesmith.paths import exists, expand_user
from tunesmith.runs.identity import recorded_date
from tunesmith.runs.tuned import TunedModel
from tunesmith.urls import is_url

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_ROWS_FOR_END_TOKENS = 64
_RENDERED = {"input", "output"}


@dataclass(frozen=True)
class TestSet:
    """The samples by their row number, how many rows were left out, and the tokens that end a trained answer.

    `path` is where they lie, or their place on the hub. `digest` is of the whole set.
    """

    path: Path
    samples: dict[int, Prompt]
    num_skipped: int
    end_tokens: frozenset[int]
    digest: str

    @property
    def longest_prompt(self) -> int:
        """Return the length of the longest prompt, in tokens."""
        return max(len(prompt.input_ids) for prompt in self.samples.values())


def read_test_set(tuned: TunedModel, config: EvaluateConfig, tokenizer: PreTrainedTokenizerFast) -> TestSet:
    """Return the first `max_samples` rows that ask something.

    The run's own test set holds rendered rows. Rows of another set go through the run's templates, unless
    they are conversations or are rendered already.

    Raises:
        DataError: the set is missing, empty or malformed, or no row asks anything.
    """
    settings = _find_test_set(tuned, config)
    path = Path(settings.dataset_name)
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"the test file `{path}` is empty", "give one with at least one row")
    rows, formats = _rendered_rows(tuned, settings)
    date = recorded_date(tuned.params)
    formats = [row_format.with_tokenizer(tokenizer, date) for row_format in formats]
    taken: list[RenderedRow] = list(islice(rows, config.max_samples))
    _check_characters(path, taken)
    prompts = {number: prompt_of(formats, row) for number, row in enumerate(taken)}
    samples = {number: prompt for number, prompt in prompts.items() if prompt is not None}
    if not samples:
        raise DataError(
            f"none of the {len(taken):,} rows of `{path}` asks anything: there is no prompt to answer",
            "plain text has no answers to compare; the run's validation loss tells how well it was learned",
        )
    # What the model has learned to stop with.
    encoded = encode_rows(formats, taken[:_ROWS_FOR_END_TOKENS], Findings())
    ends = frozenset(example.segments[0].input_ids[-1] for examples in encoded for example in examples)
    return TestSet(path, samples, len(taken) - len(samples), ends, source_fingerprint(settings))


def _find_test_set(tuned: TunedModel, config: EvaluateConfig) -> HFDatasetConfig:
    """Return where the rows are read from: the set or the split that was named, else the run's own test set."""
    if config.test_dataset is not None:
        named = HFDatasetConfig(dataset_name=config.test_dataset, split=config.test_split or "test")
        try:
            path = local_path(named)
        except DataError as error:
            if is_url(config.test_dataset) or exists(expand_user(config.test_dataset)):
                raise
            raise DataError(
                f"there is no test file `{config.test_dataset}`",
                "give a hub id, or a JSONL, JSON, CSV or Parquet file",
            ) from error
        return named if path is None else named.model_copy(update={"dataset_name": str(path)})
    if config.test_split is None:
        return HFDatasetConfig(dataset_name=str(_own_test_set(tuned)), split="test")
    if tuned.params is None or len(tuned.dataset.data_sets) > 1:
        known = "no data set is known" if tuned.params is None else "there are several data sets"
        raise DataError(
            f"`test_split` is `{config.test_split}`, and {known} of which it could be a split",
            "name its data set: --test_dataset",
        )
    (trained,) = tuned.dataset.data_sets
    check_other_split(trained, config.test_split, "test_split")
    return trained.model_copy(update={"split": config.test_split, "name": None})


def _check_characters(path: Path, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"row {number} of `{path}` holds half a surrogate pair, which is no character",
                "mend the row's text",
            ) from error


def _own_test_set(tuned: TunedModel) -> Path:
    if tuned.data_dir is None:
        raise DataError(
            f"no run is known for `{tuned.folder}`, and so no test set",
            "give one with --test_dataset rows.jsonl",
        )
    path = tuned.data_dir / "test.jsonl"
    if not path.is_file():
        raise DataError(
            f"the run's test set `{path}` is not there", "give one with --test_dataset rows.jsonl"
        )
    if path.stat().st_size == 0:
        raise DataError(
            f"the run kept no test set: `{path}` is empty",
            "give one with --test_dataset rows.jsonl; a new run keeps one with --train_split_ratio 0.9",
        )
    return path


def _rendered_rows(
    tuned: TunedModel, settings: HFDatasetConfig
) -> tuple[Iterator[RenderedRow], list[RowFormat]]:
    """Return the rows of the test set, and the formats of the data sets that they are of."""
    path = Path(settings.dataset_name)
    is_own = tuned.data_dir is not None and path.parent.absolute() == tuned.data_dir.absolute()
    if is_own and tuned.params is not None:
        formats = recorded_formats(tuned.params["data"]["row_format"], tuned.dataset.sources)
        return (row for _, row in read_rows(settings)), formats
    first = _read_first(settings)
    source = describe_source(settings)
    templates = TemplateFormat.from_settings(tuned.dataset.data_sets[0])
    if set(without_tag(first)) == _RENDERED and templates.absent_from(first):
        logger.info("%s: rows are rendered already, as input and output", source)
        return (without_tag(row) for _, row in read_rows(settings)), [templates]
    row_format = _choose_for_file(tuned.dataset.data_sets, first, source)
    logger.info("%s: rows are read as %s, because %s", source, row_format.name, row_format.why)
    return (row_format.render(row, where) for where, row in read_rows(settings)), [row_format]


def _read_first(settings: HFDatasetConfig) -> dict[str, Any]:
    try:
        return next(read_rows(settings))[1]
    except DataError as error:
        # The split of a run's rows is --split; here that is no flag.
        hint = error.hint and re.sub(r"--split\b", "--test_split", error.hint)
        raise DataError(error.message, hint) from error


def _choose_for_file(data_sets: Sequence[HFDatasetConfig], first: dict[str, Any], source: str) -> RowFormat:
    """Return how the run would read the row: as those of its first data set that can be read like it."""
    for settings in data_sets[:-1]:
        with suppress(DataError):
            return choose_format(settings, first, source)
    return choose_format(data_sets[-1], first, source)
