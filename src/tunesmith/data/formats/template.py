"""Templates over columns: the prompt untrained, the completion trained. Rendered as `{"input", "output"}`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.config import HFDatasetConfig
from tunesmith.data.encode import MarkedText, TextEncoder
from tunesmith.data.examples import Example
from tunesmith.data.formats.base import (
    ColumnsFormat,
    Findings,
    Prompt,
    RenderedRow,
    chosen_mapping,
    list_columns,
    text_of,
)
from tunesmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from typing import Self

    from transformers import PreTrainedTokenizerFast

# One step of a template: a doubled brace, a placeholder, a stray brace, or text without braces.
_PIECE = re.compile(r"(?P<escape>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<stray>[{}])|(?P<literal>[^{}]+)")
_DOUBLED = re.compile(r"(?<!\{)\{\{(?!\{)\s*(?P<name>[^{}]*?)\s*\}\}(?!\})")
_PRINTF = re.compile(r"%\((?P<name>[^()]*)\)s")
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

    @property
    def opening(self) -> str:
        """The fixed text before the first placeholder."""
        fixed = takewhile(lambda piece: piece[1] is None, self.pieces)
        return "".join(literal for literal, _ in fixed)

    @property
    def seems_escaped(self) -> bool:
        """Tell whether backslash-n stands in it, and no newline."""
        fixed = "".join(literal for literal, _ in self.pieces)
        return "\\n" in fixed and "\n" not in fixed

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the text with each placeholder's value in its place."""
        return "".join(literal if name is None else values[name] for literal, name in self.pieces)


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
class TemplateFormat(ColumnsFormat):
    """Rows that fill two templates; `columns` maps each placeholder to its column."""

    name: ClassVar[str] = "template"
    why: str
    input_template: Template
    output_template: Template
    columns: tuple[tuple[str, str], ...]
    encoder: TextEncoder | None = None

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        if not settings.gives_template:
            return None
        chosen = cls.from_settings(settings)
        if absent := chosen.absent_from(first):
            raise _absent_column(chosen, absent[0], settings.field_mapping, first, source)
        chosen._check_placeholders(settings, first)
        return replace(chosen, why="templates were given")

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig) -> Self:
        input_template = parse_template(settings.input_template, "input_template")
        output_template = parse_template(settings.output_template, "output_template")
        names = dict.fromkeys([*output_template.names, *input_template.names])
        columns = sorted((name, settings.field_mapping.get(name, name)) for name in names)
        return cls("it was recorded", input_template, output_template, tuple(columns))

    def _check_placeholders(self, settings: HFDatasetConfig, columns: Iterable[str]) -> None:
        """Refuse a template that means a column and doesn't name it: every row would teach the same text."""
        known = {*columns, *settings.field_mapping}
        for template, text in (
            (self.input_template, settings.input_template),
            (self.output_template, settings.output_template),
        ):
            doubled = [match for match in _DOUBLED.finditer(text) if match["name"] in known]
            printf = [match for match in _PRINTF.finditer(text) if match["name"] in known]
            if printf:
                raise ConfigError(
                    f"`{template.setting}` has `{printf[0][0]}`, which is text and no column",
                    f"a placeholder is a column's name in braces: write {{{printf[0]['name']}}}",
                )
            if doubled:
                raise ConfigError(
                    f"`{template.setting}` has `{doubled[0][0]}`, which is the text `{{{doubled[0]['name']}}}` and no column",
                    f"a placeholder has single braces: write {{{doubled[0]['name']}}}",
                )
        if not self.output_template.names:
            raise ConfigError(
                "`output_template` has no placeholder: every row would train the same answer",
                f"{list_columns(columns)}; write one as {{column}}",
            )
        if settings.input_template.strip() and not self.input_template.names:
            raise ConfigError(
                "`input_template` has no placeholder: every row would ask the same",
                f"{list_columns(columns)}; write one as {{column}}, or leave the template empty to train the output alone",
            )

    def absent_from(self, columns: Iterable[str]) -> list[str]:
        """Return the placeholders whose columns aren't among `columns`, the output template's first."""
        mapped, present = dict(self.columns), set(columns)
        names = dict.fromkeys([*self.output_template.names, *self.input_template.names])
        return [name for name in names if mapped[name] not in present]

    def used_columns(self) -> set[str]:
        return {column for _, column in self.columns}

    def identity(self) -> str:
        """Return the templates with their columns filled in."""
        columns = dict(self.columns)
        resolved = [
            [(literal, name and columns[name]) for literal, name in template.pieces]
            for template in (self.input_template, self.output_template)
        ]
        return json.dumps([self.name, resolved], ensure_ascii=False)

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        values = {name: text_of(row, column, where) for name, column in self.columns}
        # A row without an answer has none to learn, whatever the template puts around it.
        is_answered = any(values[name] for name in self.output_template.names)
        output = self.output_template.fill(values) if is_answered else ""
        return {"input": self.input_template.fill(values), "output": output}

    def split_key(self, row: RenderedRow) -> RenderedRow:
        return row

    def warnings(self) -> list[str]:
        return [
            f"`{template.setting}` holds a backslash and an n where a newline may be meant, and no newline: in YAML a "
            f'newline is written so in double quotes alone, as {template.setting}: "…\\n"'
            for template in (self.input_template, self.output_template)
            if template.seems_escaped
        ]

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerFast, date: str) -> Self:
        return replace(self, encoder=TextEncoder(tokenizer))

    def encode(self, rows: Sequence[RenderedRow], findings: Findings) -> Iterator[list[Example]]:
        assert self.encoder is not None
        return self.encoder.encode_rows(list(map(mark_completion, rows)))

    def prompt(self, row: RenderedRow) -> Prompt | None:
        """Return the prompt, and with it what every answer begins with, such as `### Response:`.

        Else the base model would lose for not knowing it, and the tuned one win for repeating it.
        """
        assert self.encoder is not None
        question, answer, opening = row["input"], row["output"], self.output_template.opening
        if not answer.startswith(opening):
            opening = ""
        reference = answer.removeprefix(opening)
        if not question or not reference.strip():
            return None
        return Prompt(*self.encoder.split_prompt(question + answer, len(question + opening)), reference)


@dataclass(frozen=True)
class AlpacaFormat(TemplateFormat):
    """Rows of `instruction` and `output` that fill the default templates; an absent `input` is empty."""

    own_columns: ClassVar[tuple[str, ...]] = ("instruction", "input", "output")

    @classmethod
    def choose(cls, settings: HFDatasetConfig, first: Mapping[str, Any], source: str) -> Self | None:
        chosen = cls.from_settings(settings)
        if settings.gives_template:
            return None
        absent = [name for name in chosen.absent_from(first) if chosen._is_needed(name)]
        if absent and set(cls.own_columns) & set(chosen_mapping(settings)):
            raise _absent_column(chosen, absent[0], settings.field_mapping, first, source)
        return None if absent else replace(chosen, why="the columns fill the default templates")

    def _is_needed(self, name: str) -> bool:
        """Tell whether every row must have this column: an `input` that isn't mapped may be absent."""
        return name != "input" or dict(self.columns)["input"] != "input"

    def render(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        if row.get("history"):
            raise DataError(
                f"{where} has a `history`, which the templates leave out",
                "write such rows as conversations, or give input_template and output_template",
            )
        return super().render({"input": None, **row}, where)


def mark_completion(row: RenderedRow) -> list[MarkedText]:
    """Return the text of a row of prompt and completion, trained after the prompt's end."""
    prompt, completion = row["input"], row["output"]
    # An empty completion would teach the model to stop at once.
    if not completion:
        return []
    text = prompt + completion
    return [MarkedText(text, ((len(prompt), len(text)),), ends=False)]


def _absent_column(
    chosen: TemplateFormat, name: str, mapping: Mapping[str, str], columns: Iterable[str], source: str
) -> DataError:
    if name in mapping:
        message = f"`field_mapping` names column `{mapping[name]}`, absent from {source}"
    else:
        is_of_input = name in chosen.input_template.names
        setting = (chosen.input_template if is_of_input else chosen.output_template).setting
        message = f"`{setting}` has the placeholder `{{{name}}}`, and {source} has no such column"
    hint = list_columns(columns)
    if re.search(r"%|\|", name):
        hint += "; templates are no Jinja: a placeholder is a column's plain name"
    return DataError(message, hint)
