"""The samples of an evaluation: test rows as prompts, rendered by the templates that trained the model."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import EvaluateConfig, HFDatasetConfig
from tunesmith.data.comparison import Found
from tunesmith.data.encode import RowError
from tunesmith.data.formats import Findings, Prompt, RenderedRow, RowFormat, choose_format
from tunesmith.data.formats.template import TemplateFormat
from tunesmith.data.mixture import encode_rows, prompt_of, recorded_formats, without_tag
from tunesmith.data.sources import describe_source, local_path, read_rows, source_fingerprint
from tunesmith.data.split import check_other_split
from tunesmith.errors import DataError
from tunesmith.evaluate.answers import Answer, AnswerReader
from tunesmith.evaluate.repeats import find_trained, group_alike
from tunesmith.paths import exists, expand_user
from tunesmith.runs.identity import recorded_date
from tunesmith.runs.tuned import TunedModel
from tunesmith.urls import is_url

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_ROWS_FOR_END_TOKENS = 64
_RENDERED = {"input", "output"}


# What hints say of a run's data sets, and what it is here.
_OWN_WORDS = {
    "--split": "--test_split",
    "dataset_config, split": "test_config, test_split",
    "dataset_config": "test_config",
    "take its Parquet branch: dataset_revision: refs/convert/parquet": (
        "download its Parquet branch, refs/convert/parquet, and give that folder as --test_dataset"
    ),
}
PLAIN_TEXT = "plain text, which asks nothing"
NO_ANSWER = "no answer to compare with"
REASONING_ALONE = "an answer that is reasoning alone"
TOO_LONG = "a prompt that fills max_model_len"


@dataclass(frozen=True)
class TestSet:
    """The samples by their row number, and the tokens that end a trained answer.

    `path` is where they lie, or their place on the hub. `digest` is of the whole set. `references` are the expected
    answers as they are compared, `groups` the first sample that asks the same, `trained` what the run was trained on:
    None where that isn't known. `left_out` counts rows that aren't asked, by reason. `has_more`: rows lie behind those
    that were read.
    """

    path: Path
    samples: dict[int, Prompt]
    references: dict[int, Answer]
    groups: dict[int, int]
    trained: dict[int, Found] | None
    left_out: dict[str, int]
    has_more: bool
    end_tokens: frozenset[int]
    digest: str

    @property
    def longest_prompt(self) -> int:
        """Return the length of the longest prompt, in tokens."""
        return max(len(prompt.input_ids) for prompt in self.samples.values())

    def within(self, max_model_len: int, others: Mapping[int, Sequence[int]]) -> TestSet:
        """Return the set without the prompts that leave no room for an answer in so many tokens.

        `others` are the same prompts in other tokens, by sample: for those that are read in both.

        Raises:
            DataError: no prompt leaves any.
        """
        fitting = {
            n: p
            for n, p in self.samples.items()
            if max(len(p.input_ids), len(others.get(n, ()))) < max_model_len
        }
        num_long = len(self.samples) - len(fitting)
        if not fitting:
            raise DataError(
                f"all {num_long:,} prompts of `{self.path}` fill `max_model_len` ({max_model_len} tokens)",
                "raise --max_model_len, or give shorter prompts",
            )
        if not num_long:
            return self
        logger.warning(
            "%d of %d prompts fill max_model_len (%d tokens) and are left out",
            num_long,
            len(self.samples),
            max_model_len,
        )
        return replace(
            self,
            samples=fitting,
            # The first of a group may be among those that are left out.
            groups=group_alike(fitting),
            left_out={**self.left_out, TOO_LONG: num_long},
        )


def read_test_set(tuned: TunedModel, config: EvaluateConfig, tokenizer: PreTrainedTokenizerFast) -> TestSet:
    """Return the first `max_samples` rows, those of them that ask something.

    The run's own test set holds rendered rows. Rows of another set are read as the run's were, or as the settings say,
    unless they are rendered already.

    Raises:
        DataError: the set is missing, empty or malformed, or no row asks anything.
    """
    settings = _find_test_set(tuned, config)
    path = Path(settings.dataset_name)
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"the test file `{path}` is empty", "give one with at least one row")
    rows, formats = _rendered_rows(tuned, config, settings)
    date = recorded_date(tuned.params)
    formats = [row_format.with_tokenizer(tokenizer, date) for row_format in formats]
    taken: list[RenderedRow] = list(islice(rows, config.max_samples))
    has_more = False
    with suppress(DataError):  # what isn't read may be malformed
        has_more = next(rows, None) is not None
    _check_characters(path, taken)
    samples, references, left_out = _ask(path, formats, taken, AnswerReader(tokenizer))
    if not samples:
        raise _nothing_to_ask(path, len(taken), left_out)
    trained = find_trained(tuned, formats, {number: taken[number] for number in samples})
    if trained:
        logger.warning("%d of the %d samples, or their prompts, were trained on", len(trained), len(samples))
    return TestSet(
        path,
        samples,
        references,
        group_alike(samples),
        trained,
        left_out,
        has_more,
        _learned_ends(path, formats, taken),
        source_fingerprint(settings),
    )


def _ask(
    path: Path, formats: Sequence[RowFormat], rows: Sequence[RenderedRow], reader: AnswerReader
) -> tuple[dict[int, Prompt], dict[int, Answer], dict[str, int]]:
    """Return the prompts and the expected answers by the rows' numbers, and how many rows have none, by reason."""
    samples: dict[int, Prompt] = {}
    references: dict[int, Answer] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows):
        try:
            prompt = prompt_of(formats, row)
        except DataError as error:
            raise DataError(f"row {number + 1} of `{path}`: {error.message}", error.hint) from error
        if prompt is None:
            left_out[_why_not_asked(row)] += 1
            continue
        reference = reader.read_reference(prompt.reference, prompt.text)
        if not reference.text.strip():
            left_out[REASONING_ALONE if reference.reasoning else NO_ANSWER] += 1
            continue
        samples[number], references[number] = prompt, reference
    return samples, references, dict(left_out)


def _nothing_to_ask(path: Path, num_rows: int, left_out: dict[str, int]) -> DataError:
    if PLAIN_TEXT in left_out:
        return DataError(
            f"none of the {num_rows:,} rows of `{path}` asks anything: there is no prompt to answer",
            "plain text has no answers to compare; the run's validation loss tells how well it was learned",
        )
    listed = ", ".join(f"{number:,} with {reason}" for reason, number in left_out.items())
    return DataError(
        f"none of the {num_rows:,} rows of `{path}` can be compared: {listed}",
        "give rows with a question and the answer to it",
    )


def _why_not_asked(row: RenderedRow) -> str:
    return PLAIN_TEXT if row.get("output") and not row.get("input") else NO_ANSWER


def _learned_ends(path: Path, formats: Sequence[RowFormat], rows: Sequence[RenderedRow]) -> frozenset[int]:
    """Return the tokens that the model has learned to stop with."""
    findings: Findings = Counter()
    try:
        encoded = list(encode_rows(formats, rows[:_ROWS_FOR_END_TOKENS], findings))
    except RowError as error:
        raise DataError(f"row {error.index + 1} of `{path}`: {error.message}", error.hint) from error
    for what, number in findings.items():
        logger.warning("%d of the first %d rows: %s", number, len(rows[:_ROWS_FOR_END_TOKENS]), what)
    return frozenset(example.segments[0].input_ids[-1] for examples in encoded for example in examples)


def _find_test_set(tuned: TunedModel, config: EvaluateConfig) -> HFDatasetConfig:
    """Return where the rows are read from: the set or the split that was named, else the run's own test set."""
    if config.test_dataset is not None:
        named = HFDatasetConfig.as_written(
            dataset_name=config.test_dataset,
            dataset_config=config.test_config,
            split=config.test_split or "test",
        )
        try:
            path = local_path(named)
        except DataError as error:
            if is_url(config.test_dataset) or exists(expand_user(config.test_dataset)):
                raise _with_own_hint(error) from error
            raise DataError(
                f"there is no test file `{config.test_dataset}`",
                "give a hub id, or a JSONL, JSON, CSV or Parquet file",
            ) from error
        return named if path is None else named.model_copy(update={"dataset_name": str(path)})
    if config.test_split is None:
        return HFDatasetConfig.as_written(dataset_name=str(_own_test_set(tuned)), split="test")
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
    tuned: TunedModel, config: EvaluateConfig, settings: HFDatasetConfig
) -> tuple[Iterator[RenderedRow], list[RowFormat]]:
    """Return the rows of the test set, and the formats of the data sets that they are of."""
    path = Path(settings.dataset_name)
    is_own = tuned.data_dir is not None and path.parent.absolute() == tuned.data_dir.absolute()
    given = config.given_reading
    if is_own and tuned.params is not None:
        if given:
            logger.warning("`%s` isn't used: the run has rendered its own test set", next(iter(given)))
        formats = recorded_formats(tuned.params["data"]["row_format"], tuned.dataset.sources)
        return (row for _, row in read_rows(settings)), formats
    first = _read_first(settings)
    source = describe_source(settings)
    known = [data_set.model_copy(update=given) for data_set in tuned.dataset.data_sets]
    templates = TemplateFormat.from_settings(known[0])
    if set(without_tag(first)) == _RENDERED and templates.absent_from(first):
        logger.info("%s: rows are rendered already, as input and output", source)
        return (without_tag(row) for _, row in read_rows(settings)), [templates]
    row_format = _choose_for_file(known, first, source)
    logger.info("%s: rows are read as %s, because %s", source, row_format.name, row_format.why)
    return (row_format.render(row, where) for where, row in read_rows(settings)), [row_format]


def _read_first(settings: HFDatasetConfig) -> dict[str, Any]:
    try:
        return next(read_rows(settings))[1]
    except DataError as error:
        raise _with_own_hint(error) from error


def _with_own_hint(error: DataError) -> DataError:
    """Return an error of the data sets' with the settings that evaluate has: the split of a run's rows is --split."""
    hint = error.hint
    for words, own in _OWN_WORDS.items():
        hint = hint and re.sub(rf"{words}(?![\w])", own, hint)
    return DataError(error.message, hint)


def _choose_for_file(data_sets: Sequence[HFDatasetConfig], first: dict[str, Any], source: str) -> RowFormat:
    """Return how the run would read the row: as those of its first data set that can be read like it."""
    for settings in data_sets[:-1]:
        with suppress(DataError):
            return choose_format(settings, first, source)
    return choose_format(data_sets[-1], first, source)
