"""One turn of a rendered conversation: where its own characters begin, and which of them are reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.align import Span
from tunesmith.data.formats.chat_template import END_THINK, THINK, Messages, split_reasoning, with_article
from tunesmith.errors import DataError

_REST_OF_BLOCK = re.compile(rf"(?:\s*{THINK})?.*?{END_THINK}\s*", re.DOTALL)
# What JSON may be written with and without.
_NOT_SAID = re.compile(r"[\s\\\"]")
_CLOSING = re.compile(rf"\s*{END_THINK}\s*")


@dataclass(frozen=True)
class Turn:
    """A conversation up to the end of one turn, whose own characters begin at `start`.

    They end at `content_end`, or with the end token that comes there.
    """

    text: str
    start: int
    content_end: int

    @property
    def ends(self) -> bool:
        """Whether the turn has an end token."""
        return self.content_end < len(self.text)

    @property
    def said(self) -> str:
        """The turn's own characters, without its end token."""
        return self.text[self.start : self.content_end]


def find_changed(messages: Messages, turn: Turn) -> Iterator[str]:
    """Yield which messages aren't in the text as they are written, in words."""
    for index, message in enumerate(messages):
        reasoning, answer = (
            split_reasoning(message) if message["role"] == "assistant" else ("", message["content"])
        )
        if not _appears(answer.strip(), turn.text, is_result=message["role"] == "tool"):
            yield f"the text of {with_article(message['role'])} message, or changes it"
        # Of earlier turns the reasoning isn't seen at inference either.
        elif index == len(messages) - 1 and reasoning.strip() not in turn.text[turn.start :]:
            yield "the reasoning"


def _appears(text: str, whole: str, is_result: bool) -> bool:
    """Tell whether a text stands in the whole: as it is, or as JSON, in which templates write what tools return."""
    if text in whole or json.dumps(text, ensure_ascii=False)[1:-1] in whole:
        return True
    return is_result and _NOT_SAID.sub("", text) in _NOT_SAID.sub("", whole)


def without(spans: Sequence[Span], hole: Span) -> list[Span]:
    """Return what the spans hold outside the hole."""
    parts = [
        part for start, end in spans for part in ((start, min(end, hole[0])), (max(start, hole[1]), end))
    ]
    return [(start, end) for start, end in parts if start < end]


def answer_start(turn: Turn, message: Mapping[str, Any]) -> int:
    """Return where the answer begins in the turn, behind its reasoning or the empty block that stands for it."""
    reasoning, answer = split_reasoning(message)
    if not reasoning.strip():
        opened = turn.text[: turn.start].rstrip().endswith(THINK)
        begins = opened or turn.text[turn.start :].lstrip().startswith(THINK)
        block = _REST_OF_BLOCK.match(turn.text, turn.start) if begins else None
        return block.end() if block else turn.start
    end = turn.text.find(reasoning.strip(), turn.start) + len(reasoning.strip())
    if closing := _CLOSING.match(turn.text, end):
        return closing.end()
    said = turn.text[end : turn.content_end].rstrip()
    if said.endswith(answer.strip()):
        return end + len(said) - len(answer.strip())
    return max(turn.text.find(answer.strip(), end), end)


def reopen(prompt: str, text: str, message: Mapping[str, Any], turn: int) -> tuple[str, int]:
    """Return the turn with its reasoning behind the prompt that opens it, and where it starts.

    The template has taken the reasoning out of `text`, the finished turn.
    """
    reasoning, answer = split_reasoning(message)
    before, opening = prompt[: prompt.rindex(THINK)], prompt[prompt.rindex(THINK) :]
    if not text.startswith(before):
        raise not_faithful(turn)
    content = message["content"].lstrip()
    if content.startswith(THINK):
        written = content[: len(content) - len(answer)]
        block = written.removeprefix(opening if written.startswith(opening) else THINK)
    else:
        block = f"{reasoning.strip()}\n{END_THINK}\n\n"
    return prompt + block + text[len(before) :].lstrip(), len(prompt)


def turn_start(prompt: str, text: str, content: str, turn: int) -> int:
    """Return where the trained characters of `text` begin: at the end of `prompt`, the generation prompt.

    Some templates open a block in the generation prompt that they leave out of finished turns. There the
    turn begins with its content, if that stands just where the two texts part.
    """
    if text.startswith(prompt):
        return len(prompt)
    parts = _common(prompt, text)
    content = content.strip()
    start = text.rfind(content, max(0, parts - len(content) + 1), parts + len(content)) if content else -1
    if start < 0:
        raise not_faithful(turn)
    return start


def not_faithful(turn: int) -> DataError:
    """Return the error of a message (from 0) that is rendered otherwise than inference would see it."""
    return DataError(
        f"the chat template renders message {turn + 1} otherwise than its generation prompt begins it, "
        "so it can't be trained faithfully",
        "use another chat template, or give input_template and output_template",
    )


def _common(one: str, other: str) -> int:
    """Return the index of the first character in which the texts differ."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
