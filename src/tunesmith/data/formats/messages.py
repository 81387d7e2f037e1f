"""Conversations, through the tokenizer's chat template. Rendered as `{"messages", "trained", "tools"}`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.encode import MarkedText, RowError, TextEncoder, name_of
from tunesmith.data.examples import Example
from tunesmith.data.formats.base import ColumnsFormat, Findings, Prompt, RenderedRow
from tunesmith.data.formats.chat import ChatRenderer
from tunesmith.data.formats.conversation import ConversationReader, is_answer
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerFast

# What is said in a message; ids and dates may come with it.
_SAID = ("role", "content", "tool_calls")


@dataclass(frozen=True)
class MessagesFormat(ColumnsFormat):
    """Rows that are conversations, which `reader` finds in their columns."""

    name: ClassVar[str] = "messages"
    own_columns: ClassVar[tuple[str, ...]] = ("messages", "conversations")
    why: str
    reader: ConversationReader = field(default_factory=ConversationReader)
    trains_reasoning: bool = True
    refuses_unrendered: bool = True
    encoder: TextEncoder | None = None
    chat: ChatRenderer | None = None

    @property
    def date(self) -> str | None:  # type: ignore[override]
        return self.chat.date if self.chat is not None else None

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        for name in cls.own_columns:
            reader = ConversationReader.from_settings(settings, (name,))
            if reader.columns[0] in first:
                why = f"there is a column `{reader.columns[0]}`"
                return replace(cls.from_settings(settings), why=why, reader=reader)
        return None

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        return cls(
            "it was recorded",
            trains_reasoning=settings.train_on_reasoning,
            refuses_unrendered=settings.unrendered == "refuse",
        )

    def used_columns(self) -> set[str]:
        return {*self.reader.columns, self.reader.system_column, self.reader.tools_column}

    def identity(self) -> str:
        columns = [] if self.reader.columns == ("messages",) else self.reader.columns
        options = self.reader.identity()
        if not self.trains_reasoning:
            options["trains_reasoning"] = False
        return json.dumps([self.name, columns, *([options] if options else [])], ensure_ascii=False)

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        return self.reader.read(row, where)

    def split_key(self, row: RenderedRow) -> RenderedRow:
        """Return what is said, without the ids and dates that may come with it."""
        said = [{key: message.get(key) for key in _SAID} for message in row["messages"]]
        return {**row, "messages": said}

    def questions(self, row: RenderedRow) -> list[Any]:
        said = [{key: message.get(key) for key in _SAID} for message in row["messages"]]
        return [said[:index] for index in range(len(said)) if is_answer(said, index)]

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast, date: str) -> Self:
        # A chat template writes the special tokens itself.
        encoder = TextEncoder(tokenizer, add_special_tokens=False)
        if not tokenizer.chat_template:
            raise DataError(
                f"the rows are conversations, and the tokenizer of `{name_of(tokenizer)}` has no chat template",
                "use an instruct model, give --chat_template FILE, or give input_template and output_template",
            )
        chat = ChatRenderer(tokenizer, date, self.trains_reasoning, self.refuses_unrendered)
        return replace(self, encoder=encoder, chat=chat)

    def encode(self, rows: Sequence[RenderedRow], findings: Findings) -> Iterator[list[Example]]:
        assert self.encoder is not None
        return self.encoder.encode_rows([self._mark(row, index, findings) for index, row in enumerate(rows)])

    def prompt(self, row: RenderedRow) -> Prompt | None:
        """Return everything before the last assistant message that is trained, which is the reference."""
        assert self.encoder is not None and self.chat is not None
        asked = self.chat.last_question(row)
        if asked is None:
            return None
        return Prompt(*self.encoder.split_prompt(asked.text, asked.start), asked.reference)

    def _mark(self, row: RenderedRow, index: int, findings: Findings) -> list[MarkedText]:
        assert self.chat is not None
        try:
            return self.chat.render(row, findings)
        except DataError as error:
            raise RowError(error.message, error.hint, index) from error
