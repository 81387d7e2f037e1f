"""The formats of rows, in the order in which they are tried; a new one is a file here and a line in the list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.config import HFDatasetConfig
from tunesmith.data.formats.base import Prompt, RenderedRow, RowFormat, list_columns
from tunesmith.data.formats.messages import MessagesFormat
from tunesmith.data.formats.prompt_completion import PromptCompletionFormat, PromptCompletionMessagesFormat
from tunesmith.data.formats.template import AlpacaFormat, TemplateFormat
from tunesmith.data.formats.text import TextFormat
from tunesmith.errors import DataError

__all__ = ["ROW_FORMATS", "Prompt", "RenderedRow", "RowFormat", "choose_format", "format_named"]

ROW_FORMATS: list[type[RowFormat]] = [
    TemplateFormat,
    MessagesFormat,
    PromptCompletionFormat,
    PromptCompletionMessagesFormat,
    AlpacaFormat,
    TextFormat,
]


def choose_format(settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> RowFormat:
    """Return the first format that fits the first row.

    Raises:
        ConfigError: a malformed template.
        DataError: a placeholder without its column, or columns that fit no format.
    """
    for candidate in ROW_FORMATS:
        if (chosen := candidate.choose(settings, first, source)) is not None:
            return chosen
    raise DataError(
        f"no way to read the rows of {source}: no templates were given, and there are neither "
        "`messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, nor `text`",
        f"{list_columns(first)}; set input_template and output_template with {{placeholders}} for them, "
        "or field_mapping",
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
