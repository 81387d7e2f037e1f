"""Conversations, through the tokenizer's chat template. Rendered as `{"messages", "trained", "tools"}`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.encode import MarkedText, RowError, TextEncoder, name_of
from tunesmith.data.examples import Example
from tunesmith.data.formats.base import Prompt, RenderedRow
from tunesmith.data.formats.chat import ChatRenderer
from tunesmith.data.formats.conversation import read_conversation
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerFast

# What is said in a message; ids and dates may come with it.
_SAID = ("role", "content", "tool_calls")


@dataclass(frozen=True)
class MessagesFormat:
    """Rows that are conversations, which lie in `columns`, one after the other."""

    name: ClassVar[str] = "messages"
    num_segments: ClassVar[int] = 1
    why: str
    columns: tuple[str, ...] = ("messages",)
    encoder: TextEncoder | None = None
    chat: ChatRenderer | None = None

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        for column in ("messages", "conversations"):
            if column in first:
                return cls(f"there is a column `{column}`", (column,))
        return None

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        return cls("it was recorded")

    def identity(self) -> str:
        return json.dumps([self.name, [] if self.columns == ("messages",) else self.columns])

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        return read_conversation(row, self.columns, where)

    def split_key(self, row: RenderedRow) -> RenderedRow:
        """Return what is said, without the ids and dates that may come with it."""
        said = [{key: message.get(key) for key in _SAID} for message in row["messages"]]
        return {**row, "messages": said}

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> Self:
        # A chat template writes the special tokens itself.
        encoder = TextEncoder(tokenizer, add_special_tokens=False)
        if not tokenizer.chat_template:
            raise DataError(
                f"the rows are conversations, and the tokenizer of `{name_of(tokenizer)}` has no chat template",
                "use an instruct model, add a chat_template to its tokenizer, or give input_template and output_template",
            )
        return replace(self, encoder=encoder, chat=ChatRenderer(tokenizer))

    def encode(self, rows: Sequence[RenderedRow]) -> Iterator[list[Example]]:
        assert self.encoder is not None
        return self.encoder.encode_rows([self._mark(row, index) for index, row in enumerate(rows)])

    def prompt(self, row: RenderedRow) -> Prompt | None:
        """Return everything before the last assistant message that is trained, which is the reference."""
        assert self.encoder is not None and self.chat is not None
        asked = self.chat.last_question(row)
        return (
            None
            if asked is None
            else Prompt(asked.text, self.encoder.encode_prompt(asked.text), asked.reference)
        )

    def _mark(self, row: RenderedRow, index: int) -> list[MarkedText]:
        assert self.chat is not None
        try:
            return self.chat.render(row)
        except DataError as error:
            raise RowError(error.message, error.hint, index) from error
