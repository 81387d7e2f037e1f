"""The formats of rows, in the order in which they are tried; a new one is a file here and a line in the list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.config import HFDatasetConfig
from tunesmith.data.formats.base import Findings, Prompt, RenderedRow, RowFormat, chosen_mapping, list_columns
from tunesmith.data.formats.messages import MessagesFormat
from tunesmith.data.formats.prompt_completion import PromptCompletionFormat, PromptCompletionMessagesFormat
from tunesmith.data.formats.template import AlpacaFormat, TemplateFormat
from tunesmith.data.formats.text import TextFormat
from tunesmith.errors import ConfigError, DataError, TunesmithError

__all__ = ["ROW_FORMATS", "Findings", "Prompt", "RenderedRow", "RowFormat", "choose_format", "format_named"]

ROW_FORMATS: list[type[RowFormat]] = [
    TemplateFormat,
    MessagesFormat,
    PromptCompletionFormat,
    PromptCompletionMessagesFormat,
    AlpacaFormat,
    TextFormat,
]


# Settings that say something to conversations alone.
_OF_CONVERSATIONS = ("message_keys", "role_names", "system_prompt", "train_on", "train_on_reasoning")


def choose_format(settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> RowFormat:
    """Return the first format that fits the first row; those whose columns `field_mapping` names come first.

    Raises:
        ConfigError: a malformed template, or a setting that the format has no use for.
        DataError: a placeholder without its column, or columns that fit no format.
    """
    _check_mapping(settings, first, source)
    chosen: RowFormat | None = None
    others: list[str] = []
    for candidate in _in_order(settings):
        if chosen is None:
            chosen = candidate.choose(settings, first, source)
        elif candidate.name != chosen.name and _fits(candidate, settings, first, source):
            others.append(candidate.name)
    if chosen is None:
        raise DataError(
            f"no way to read the rows of {source}: no templates were given, and there are neither "
            "`messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, nor `text`",
            f"{list_columns(first)}; name them in field_mapping, as messages=dialogue or instruction=question,"
            "output=answer, or set input_template and output_template with {placeholders} for them",
        )
    unused = [name for name in _OF_CONVERSATIONS if getattr(settings, name) != getattr(_DEFAULTS, name)]
    if unused and not isinstance(chosen, MessagesFormat):
        raise ConfigError(
            f"`{unused[0]}` is for conversations, and the rows of {source} are read as {chosen.name}, because {chosen.why}",
            f"leave {unused[0]} out, or name the conversations' column: field_mapping messages=COLUMN",
        )
    return chosen.knowing(others, [column for column in first if column not in chosen.used_columns()])


_DEFAULTS = HFDatasetConfig()


def _in_order(settings: HFDatasetConfig) -> list[type[RowFormat]]:
    if settings.gives_template:
        return ROW_FORMATS
    return sorted(ROW_FORMATS, key=lambda it: not set(it.own_columns) & set(chosen_mapping(settings)))


def _fits(
    candidate: type[RowFormat], settings: HFDatasetConfig, first: Mapping[str, Any], source: str
) -> bool:
    try:
        return candidate.choose(settings, first, source) is not None
    except TunesmithError:
        return False


def _check_mapping(settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> None:
    """Refuse a mapping that nothing would use, or to a column that isn't there."""
    mapping = chosen_mapping(settings)
    if not mapping or settings.gives_template:
        return
    own = list(dict.fromkeys([*(name for it in ROW_FORMATS for name in it.own_columns), "system", "tools"]))
    if not set(own) & set(mapping):
        raise ConfigError(
            f"`field_mapping` names `{next(iter(mapping))}`, which is no format's column, and no templates were given",
            f"set input_template and output_template with {{placeholders}}, or name one of {', '.join(own)}",
        )
    for name, column in mapping.items():
        if (name in own or set(mapping) & {"messages", "conversations"}) and column not in first:
            raise DataError(
                f"`field_mapping` names column `{column}`, absent from {source}", list_columns(first)
            )


def format_named(name: str, settings: HFDatasetConfig) -> RowFormat:
    """Return the format that a run has recorded, for the rows that it has rendered.

    Raises:
        DataError: this version doesn't know it.
    """
    for candidate in ROW_FORMATS:
        if (named := candidate.from_settings(settings)).name == name:
            return named
    raise DataError(f"this version knows no row format `{name}`", "install a newer tunesmith")
