"""Conversations: a column `messages`, and `tools` beside it. Rendered as `{"messages"}`, with `tools` where there are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.encode import MarkedText, RowError, TextEncoder, name_of
from tunesmith.data.examples import Example
from tunesmith.data.formats.base import Prompt, RenderedRow, column_of
from tunesmith.data.formats.chat import ChatRenderer
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerFast

# What is said in a message; ids and dates may come with it.
_SAID = ("role", "content", "tool_calls")


@dataclass(frozen=True)
class MessagesFormat:
    """Rows that are conversations."""

    name: ClassVar[str] = "messages"
    num_segments: ClassVar[int] = 1
    why: str
    encoder: TextEncoder | None = None
    chat: ChatRenderer | None = None

    @classmethod
    def choose(cls, settings: HFDatasetConfig, columns: Sequence[str], source: str) -> Self | None:
        return cls("there is a column `messages`") if "messages" in columns else None

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        return cls("it was recorded")

    def identity(self) -> str:
        return json.dumps([self.name, []])

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        return _render_messages(row, where)

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
        """Return everything before the last assistant message, which is the reference."""
        assert self.encoder is not None and self.chat is not None
        messages = row["messages"]
        turns = [i for i in range(1, len(messages)) if messages[i]["role"] == "assistant"]
        if not turns:
            return None
        text = self.chat.render_prompt(messages[: turns[-1]], row.get("tools"))
        reference = messages[turns[-1]]["content"]
        if not text or not reference.strip():
            return None
        return Prompt(text, self.encoder.encode_prompt(text), reference)

    def _mark(self, row: RenderedRow, index: int) -> list[MarkedText]:
        assert self.chat is not None
        try:
            return self.chat.render(row)
        except DataError as error:
            raise RowError(error.message, error.hint, index) from error


def _render_messages(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    messages = column_of(row, "messages", where)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"`messages` of {where} is not a list of messages", _MESSAGE_HINT)
    rendered: dict[str, Any] = {"messages": [_check_message(m, i, where) for i, m in enumerate(messages)]}
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(
                f"`tools` of {where} is not valid JSON: {error}", "give a list of tools"
            ) from error
    if tools:
        if not isinstance(tools, list):
            raise DataError(f"`tools` of {where} is a {type(tools).__name__}", "give a list of tools")
        rendered["tools"] = tools
    return rendered


_MESSAGE_HINT = 'a conversation is a list such as [{"role": "user", "content": "…"}, …]'


def _check_message(message: Any, index: int, where: str) -> dict[str, Any]:
    place = f"message {index + 1} of {where}"
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is a {type(message).__name__}, not an object", _MESSAGE_HINT)
    if not isinstance(message.get("role"), str):
        raise DataError(f"{place} has no `role`", _MESSAGE_HINT)
    # Arrow gives every message every key of any message, as null: a template may test for their presence.
    kept = {key: value for key, value in message.items() if value is not None}
    if not isinstance(kept.setdefault("content", ""), str):
        raise DataError(
            f"`content` of {place} is a {type(kept['content']).__name__}, not text", _MESSAGE_HINT
        )
    if "content" not in message and "tool_calls" not in message:
        raise DataError(f"{place} has no `content`", _MESSAGE_HINT)
    return kept
