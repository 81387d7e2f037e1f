"""Plain text: a column `text`, all of it trained. Rendered as `{"input": "", "output": text}`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.encode import TextEncoder
from tunesmith.data.examples import Example
from tunesmith.data.formats.base import (
    ColumnsFormat,
    Findings,
    Prompt,
    RenderedRow,
    chosen_mapping,
    text_of,
)
from tunesmith.data.formats.template import mark_completion

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextFormat(ColumnsFormat):
    """Rows of plain text, which ask nothing."""

    name: ClassVar[str] = "text"
    own_columns: ClassVar[tuple[str, ...]] = ("text",)
    why: str
    column: str = "text"
    encoder: TextEncoder | None = None

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        column = chosen_mapping(settings).get("text", "text")
        return cls(f"there is a column `{column}`", column) if column in first else None

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        return cls("it was recorded")

    def used_columns(self) -> set[str]:
        return {self.column}

    def identity(self) -> str:
        return json.dumps([self.name, [] if self.column == "text" else [self.column]])

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        return {"input": "", "output": text_of(row, self.column, where)}

    def split_key(self, row: RenderedRow) -> RenderedRow:
        return row

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast, date: str) -> Self:
        return replace(self, encoder=TextEncoder(tokenizer))

    def encode(self, rows: Sequence[RenderedRow], findings: Findings) -> Iterator[list[Example]]:
        assert self.encoder is not None
        return self.encoder.encode_rows(list(map(mark_completion, rows)))

    def prompt(self, row: RenderedRow) -> Prompt | None:
        return None
