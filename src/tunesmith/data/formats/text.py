"""Plain text: a column `text`, all of it trained. Rendered as `{"input": "", "output": text}`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.encode import TextEncoder
from tunesmith.data.examples import Example
from tunesmith.data.formats.base import Prompt, RenderedRow, text_of
from tunesmith.data.formats.template import mark_completion

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TextFormat:
    """Rows of plain text, which ask nothing."""

    name: ClassVar[str] = "text"
    num_segments: ClassVar[int] = 1
    why: str
    encoder: TextEncoder | None = None

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        return cls("there is a column `text`, and none for templates or chat") if "text" in first else None

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        return cls("it was recorded")

    def identity(self) -> str:
        return json.dumps([self.name, []])

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        return {"input": "", "output": text_of(row, "text", where)}

    def split_key(self, row: RenderedRow) -> RenderedRow:
        return row

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Self:
        return replace(self, encoder=TextEncoder(tokenizer))

    def encode(self, rows: Sequence[RenderedRow]) -> Iterator[list[Example]]:
        assert self.encoder is not None
        return self.encoder.encode_rows(list(map(mark_completion, rows)))

    def prompt(self, row: RenderedRow) -> Prompt | None:
        return None
