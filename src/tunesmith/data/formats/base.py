"""What a row format is, and what formats share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Number
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from tunesmith.config import HFDatasetConfig
from tunesmith.data.examples import Example
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerFast

RenderedRow = dict[str, Any]
"""A row as text, before any tokenizer: what the sets' JSON lines hold."""


# Columns that a line names, of those that aren't used.
_MOST_NAMED = 8
# What a finding begins with that would refuse the data set if it weren't to be counted.
LEFT_OUT = "rows of which the chat template leaves out"
UNRENDERED_HINT = (
    "use a model whose chat template knows it, give --chat_template, or leave such rows out; with --unrendered count "
    "they are trained as they come out, and counted"
)
Findings = Counter[str]
"""What was found in the rows that their owner should know, in words, and how often."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids [P], and the reference answer."""

    text: str
    input_ids: tuple[int, ...]
    reference: str


class RowFormat(Protocol):
    """How the rows of one data set become text, examples and prompts.

    `name` is what runs record. `why` is the reason for the choice, for the log.
    `num_segments` is how many segments each example has, `own_columns` the columns by which it is known, which
    `field_mapping` may name. `date` (ISO) is the day that its texts name, None where
    they name none.
    """

    name: ClassVar[str]

    @property
    def why(self) -> str: ...

    num_segments: ClassVar[int]
    own_columns: ClassVar[tuple[str, ...]]

    @property
    def date(self) -> str | None: ...

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        """Return the format if it fits the first row, or was asked for; `source` names the data set in errors.

        Raises:
            ConfigError: a malformed setting.
            DataError: it was asked for, and the columns lack what it needs.
        """

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        """Return the format for rows that it has rendered already."""

    def used_columns(self) -> set[str]:
        """Return the columns that are read of a row, as far as it has them."""

    def knowing(self, others: Sequence[str], unused: Sequence[str]) -> Self:
        """Return the format with what else fitted the rows, and which columns it leaves alone, told in `why`."""

    def identity(self) -> str:
        """Return what shapes the text, as canonical JSON."""

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        """Return the rendered row; `where` names the row in errors.

        Raises:
            DataError: a column is absent from this row, or holds what can't be rendered.
        """

    def split_key(self, row: RenderedRow) -> RenderedRow:
        """Return what of a rendered row decides its set: rows with equal keys are never split."""

    def questions(self, row: RenderedRow) -> list[Any]:
        """Return what is asked in a rendered row, before each of its answers."""

    def warnings(self) -> list[str]:
        """Return what of its settings is most likely not meant so."""

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast, date: str) -> Self:
        """Return the format ready to encode, on this day (ISO) where its texts name one. It can be pickled.

        Raises:
            ModelError: the tokenizer gives no character offsets or has no end token.
            DataError: it lacks what the format needs.
        """

    def encode(self, rows: Sequence[RenderedRow], findings: Findings) -> Iterator[list[Example]]:
        """Render the rows, then yield the examples of each as they are asked for: none if nothing of it is trained.

        What their owner should know is added to `findings`.

        Raises:
            RowError: a row can't be encoded.
        """

    def prompt(self, row: RenderedRow) -> Prompt | None:
        """Return what inference sees and the answer expected after it; None if the row asks or expects nothing.

        Made as the training made it: its ids are the beginning of the row's example, before what is trained.

        Raises:
            DataError: the row can't be rendered.
        """


class ColumnsFormat:
    """What formats share that are chosen by their columns, and hold one text per example."""

    own_columns: ClassVar[tuple[str, ...]] = ()
    num_segments: ClassVar[int] = 1
    date: str | None = None

    def knowing(self, others: Sequence[str], unused: Sequence[str]) -> Self:
        others = list(dict.fromkeys(others))
        why: str = self.why  # type: ignore[attr-defined]
        if others:
            listed = " and ".join([*filter(None, [", ".join(others[:-1])]), others[-1]])
            why += f"; as {listed} they could be read too"
        if unused:
            named = ", ".join(f"`{column}`" for column in unused[:_MOST_NAMED])
            more = f" and {len(unused) - _MOST_NAMED:,} more" if len(unused) > _MOST_NAMED else ""
            why += f"; not used: {named}{more}"
        return replace(self, why=why)  # type: ignore[type-var]

    def used_columns(self) -> set[str]:
        return set(self.own_columns)

    def questions(self, row: RenderedRow) -> list[Any]:
        return [row["input"]] if row.get("input") else []

    def warnings(self) -> list[str]:
        return []


def chosen_mapping(settings: HFDatasetConfig) -> Mapping[str, str]:
    """Return the mapping that the user gave; that of the default data set asks for nothing."""
    return settings.field_mapping if "field_mapping" in settings.model_fields_set else {}


def column_of(row: Mapping[str, Any], column: str, where: str) -> Any:
    """Return the value of a column of the row at `where`."""
    if column not in row:
        raise DataError(f"{where} has no column `{column}`, which earlier rows have", list_columns(row))
    return row[column]


def is_missing(value: Any) -> bool:
    """Tell whether a row has no value there: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return a column's value as text: a number as it is written, a missing value as an empty text."""
    value = column_of(row, column, where)
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, float) and math.isinf(value):
        raise DataError(
            f"column `{column}` of {where} holds a number beyond all floats",
            "write it as text, or leave it out",
        )
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, Number):
        return str(value)
    raise DataError(
        f"column `{column}` of {where} holds a {type(value).__name__}, not text or a number",
        "name another column in field_mapping, or flatten this one in the data set",
    )


def list_columns(columns: Iterable[str]) -> str:
    """Return the columns as a hint names them."""
    names = ", ".join(f"`{name}`" for name in columns)
    return f"the columns are {names}" if names else "the rows have no columns"
