"""Columns `prompt` and `completion`, both text or both lists of messages: TRL's form. The completion is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.formats.base import chosen_mapping
from tunesmith.data.formats.conversation import ConversationReader
from tunesmith.data.formats.messages import MessagesFormat
from tunesmith.data.formats.template import TemplateFormat, parse_template

if TYPE_CHECKING:
    from typing import Self

_COLUMNS = ("prompt", "completion")


@dataclass(frozen=True)
class PromptCompletionFormat(TemplateFormat):
    """Rows of two texts, one after the other as they are."""

    name: ClassVar[str] = "prompt_completion"
    own_columns: ClassVar[tuple[str, ...]] = _COLUMNS

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        columns = _columns_of(settings)
        if not set(columns) <= set(first) or _hold_messages(columns, first):
            return None
        return replace(cls.from_settings(settings), why=_because(columns))

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        prompt, completion = (parse_template(f"{{{column}}}", column) for column in _COLUMNS)
        return cls(
            "it was recorded", prompt, completion, tuple(zip(_COLUMNS, _columns_of(settings), strict=True))
        )


@dataclass(frozen=True)
class PromptCompletionMessagesFormat(MessagesFormat):
    """Rows of two beginnings of one conversation, of which the second is trained."""

    own_columns: ClassVar[tuple[str, ...]] = _COLUMNS

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        columns = _columns_of(settings)
        if not set(columns) <= set(first) or not _hold_messages(columns, first):
            return None
        reader = ConversationReader.from_settings(settings, _COLUMNS)
        return replace(cls.from_settings(settings), why=f"{_because(columns)} of messages", reader=reader)


def _columns_of(settings: HFDatasetConfig) -> tuple[str, ...]:
    mapping = chosen_mapping(settings)
    return tuple(mapping.get(column, column) for column in _COLUMNS)


def _hold_messages(columns: tuple[str, ...], first: Mapping[str, Any]) -> bool:
    return any(isinstance(first[column], list) for column in columns)


def _because(columns: tuple[str, ...]) -> str:
    return f"there are columns `{columns[0]}` and `{columns[1]}`"
