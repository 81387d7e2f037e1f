"""Columns `prompt` and `completion`, both text or both lists of messages: TRL's form. The completion is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.formats.messages import MessagesFormat
from tunesmith.data.formats.template import TemplateFormat, parse_template

if TYPE_CHECKING:
    from typing import Self

_COLUMNS = ("prompt", "completion")


@dataclass(frozen=True)
class PromptCompletionFormat(TemplateFormat):
    """Rows of two texts, one after the other as they are."""

    name: ClassVar[str] = "prompt_completion"

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        if not _fits(first) or _holds_messages(first):
            return None
        return replace(cls.from_settings(settings), why="there are columns `prompt` and `completion`")

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        prompt, completion = (parse_template(f"{{{column}}}", column) for column in _COLUMNS)
        return cls("it was recorded", prompt, completion, tuple((column, column) for column in _COLUMNS))


@dataclass(frozen=True)
class PromptCompletionMessagesFormat(MessagesFormat):
    """Rows of two beginnings of one conversation, of which the second is trained."""

    columns: tuple[str, ...] = _COLUMNS

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        if not _fits(first) or not _holds_messages(first):
            return None
        return cls("the columns `prompt` and `completion` hold messages")


def _fits(first: Mapping[str, Any]) -> bool:
    return set(_COLUMNS) <= set(first)


def _holds_messages(first: Mapping[str, Any]) -> bool:
    return any(isinstance(first[column], list) for column in _COLUMNS)
