"""The samples of an evaluation: test rows as prompts, rendered by the templates that trained the model."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import EvaluateConfig
from tunesmith.data.comparison import Found
from tunesmith.data.encode import RowError
from tunesmith.data.formats import Findings, Prompt, RenderedRow, RowFormat
from tunesmith.data.mixture import encode_rows, prompt_of
from tunesmith.data.sources import source_fingerprint
from tunesmith.errors import DataError
from tunesmith.evaluate.answers import Answer, AnswerReader
from tunesmith.evaluate.repeats import find_trained, group_alike
from tunesmith.evaluate.test_rows import find_test_rows, render_test_rows
from tunesmith.runs.identity import recorded_date
from tunesmith.runs.tuned import TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_ROWS_FOR_END_TOKENS = 64
PLAIN_TEXT = "plain text, which asks nothing"
NO_ANSWER = "no answer to compare with"
REASONING_ALONE = "an answer that is reasoning alone"
TOO_LONG = "a prompt that fills max_model_len"


@dataclass(frozen=True)
class TestSet:
    """The samples by their row number, and the tokens that end a trained answer.

    `path` is where they lie, or their place on the hub. `digest` is of the whole set. `references` are the expected
    answers as they are compared, `groups` the first sample that asks the same, `trained` what the run was trained on:
    None where that isn't known. `calling` are those whose answer calls a tool. `left_out` counts rows that aren't
    asked, by reason. `has_more`: rows lie behind those that were read.
    """

    path: Path
    samples: dict[int, Prompt]
    references: dict[int, Answer]
    groups: dict[int, int]
    trained: dict[int, Found] | None
    calling: frozenset[int]
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
            trained=self.trained and {n: found for n, found in self.trained.items() if n in fitting},
            calling=self.calling & fitting.keys(),
            left_out={**self.left_out, TOO_LONG: num_long},
        )


def read_test_set(tuned: TunedModel, config: EvaluateConfig, tokenizer: PreTrainedTokenizerFast) -> TestSet:
    """Return the first `max_samples` rows, those of them that ask something.

    The run's own test set holds rendered rows. Rows of another set are read as the run's were, or as the settings say,
    unless they are rendered already.

    Raises:
        DataError: the set is missing, empty or malformed, or no row asks anything.
    """
    settings = find_test_rows(tuned, config)
    path = Path(settings.dataset_name)
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"the test file `{path}` is empty", "give one with at least one row")
    rows, formats = render_test_rows(tuned, config, settings)
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
        frozenset(number for number in samples if _calls(taken[number])),
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


def _calls(row: RenderedRow) -> bool:
    answers = [message for message in row.get("messages", []) if message["role"] == "assistant"]
    return bool(answers and answers[-1].get("tool_calls"))


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


def _check_characters(path: Path, rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"row {number} of `{path}` holds half a surrogate pair, which is no character",
                "mend the row's text",
            ) from error
