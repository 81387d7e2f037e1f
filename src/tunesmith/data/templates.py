"""A row → the text that is trained on: templates over columns, chat messages, or plain text.

A rendered row is what the sets' JSON lines hold: `{"input", "output"}` for templates,
`{"input": "", "output"}` for plain text, `{"messages"}` (and `tools`) for chat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal

from tunesmith.config import HFDatasetConfig
from tunesmith.errors import ConfigError, DataError

Kind = Literal["template", "messages", "text"]

# One step of a template: a doubled brace, a placeholder, a stray brace, or text without braces.
_PIECE = re.compile(r"(?P<escape>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])|(?P<literal>[^{}]+)")
_NAME = re.compile(r"[^{}\[\].!:\s](?:[^{}\[\].!:]*[^{}\[\].!:\s])?")


@dataclass(frozen=True)
class Template:
    """A parsed template: literals and placeholders in turn, `(literal, None)` or `("", name)`."""

    setting: str
    pieces: tuple[tuple[str, str | None], ...]

    @property
    def names(self) -> list[str]:
        """The placeholders, in order of their first use."""
        return list(dict.fromkeys(name for _, name in self.pieces if name is not None))


def parse_template(text: str, setting: str) -> Template:
    """Parse `text`, the value of `setting`; `{{` and `}}` are literal braces.

    Raises:
        ConfigError: a brace without its partner, or anything but a plain name between braces.
    """
    pieces: list[tuple[str, str | None]] = []
    for match in _PIECE.finditer(text):
        name = match["name"]
        if match["stray"] is not None:
            raise ConfigError(
                f"`{setting}` has a `{match['stray']}` without its partner at character {match.start() + 1}",
                "write {column} for a placeholder, and {{ or }} for a literal brace",
            )
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigError(
                f"`{setting}` has `{match[0]}` at character {match.start() + 1}, which is not a placeholder",
                "a placeholder is a plain name, as {question}: no dots, brackets, formats or conversions; "
                "write {{ and }} for literal braces",
            )
        pieces.append((match["literal"] or (match["escape"] or "")[:1], name))
    return Template(setting, tuple(pieces))


@dataclass(frozen=True)
class RowFormat:
    """How the rows of one data set become text.

    `why` is the reason for the choice, for the log; `source` names the data set in errors;
    `columns` maps each placeholder to its column.
    """

    kind: Kind
    why: str
    source: str
    input_template: Template | None = None
    output_template: Template | None = None
    columns: tuple[tuple[str, str], ...] = ()

    def identity(self) -> str:
        """What shapes the text, the templates with their columns filled in, as canonical JSON."""
        columns = dict(self.columns)
        resolved = [
            [(literal, name and columns[name]) for literal, name in template.pieces]
            for template in (self.input_template, self.output_template)
            if template is not None
        ]
        return json.dumps([self.kind, resolved], ensure_ascii=False)

    def render(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the rendered row; `where` names the row in errors.

        Raises:
            DataError: a column is absent from this row, or holds what can't be rendered.
        """
        if self.kind == "messages":
            return _render_messages(row, where)
        if self.kind == "text":
            return {"input": "", "output": _to_text(_column(row, "text", where), "text", where)}
        assert self.input_template is not None and self.output_template is not None
        columns = dict(self.columns)
        values = {
            name: _to_text(_column(row, column, where), column, where) for name, column in columns.items()
        }
        return {"input": _fill(self.input_template, values), "output": _fill(self.output_template, values)}


def choose_format(config: HFDatasetConfig, columns: Iterable[str], source: str, given: bool) -> RowFormat:
    """Choose the row format: templates if `given` by the user or filled by the columns; else `messages`; else `text`.

    Raises:
        ConfigError: a malformed template.
        DataError: a placeholder without its column, or columns that fit no format.
    """
    present = list(columns)
    input_template = parse_template(config.input_template, "input_template")
    output_template = parse_template(config.output_template, "output_template")
    used = {name: template for template in (output_template, input_template) for name in template.names}
    mapped = {name: config.field_mapping.get(name, name) for name in used}
    absent = [name for name, column in mapped.items() if column not in present]
    if given and absent:
        raise _absent_column(absent[0], used[absent[0]], config.field_mapping, present, source)
    if not absent:
        why = "templates were given" if given else "the columns fill the default templates"
        return RowFormat(
            "template", why, source, input_template, output_template, tuple(sorted(mapped.items()))
        )
    if "messages" in present:
        return RowFormat("messages", "there is a column `messages`", source)
    if "text" in present:
        return RowFormat("text", "there is a column `text`, and none for templates or chat", source)
    raise DataError(
        f"no way to read the rows of {source}: no templates were given, "
        "and there is neither a column `messages` nor `text`",
        f"{_list_columns(present)}; set input_template and output_template with {{placeholders}} for them, "
        "or field_mapping",
    )


def _absent_column(
    name: str, template: Template, mapping: Mapping[str, str], present: list[str], source: str
) -> DataError:
    if name in mapping:
        message = f"`field_mapping` names column `{mapping[name]}`, absent from {source}"
    else:
        message = f"`{template.setting}` has the placeholder `{{{name}}}`, and {source} has no such column"
    return DataError(message, _list_columns(present))


def _list_columns(columns: Iterable[str]) -> str:
    names = ", ".join(f"`{name}`" for name in columns)
    return f"the columns are {names}" if names else "the rows have no columns"


def _fill(template: Template, values: Mapping[str, str]) -> str:
    return "".join(literal if name is None else values[name] for literal, name in template.pieces)


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise DataError(f"{where} has no column `{column}`, which earlier rows have", _list_columns(row))
    return row[column]


def _to_text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, Number):
        return str(value)
    raise DataError(
        f"column `{column}` of {where} holds a {type(value).__name__}, not text or a number",
        "name another column in field_mapping, or flatten this one in the data set",
    )


def _render_messages(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    messages = _column(row, "messages", where)
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
