"""A rendered row → the prompt that inference sees, and the answer that is expected after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from tunesmith.data.encode import ChatRenderer, Encoder
from tunesmith.data.templates import Kind, parse_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids [P], and the reference answer."""

    text: str
    input_ids: tuple[int, ...]
    reference: str


class PromptEncoder:
    """Makes prompts the way the training made them: the same templates, the same special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: Kind, output_template: str) -> None:
        self._encoder = Encoder(tokenizer, kind)
        self._opening = opening_of(output_template) if kind == "template" else ""
        self._chat = ChatRenderer(tokenizer) if kind == "messages" else None

    def encode(self, row: dict[str, Any]) -> Prompt | None:
        """Return the prompt of a rendered row; None if the row asks nothing or expects nothing.

        What every answer begins with, such as `### Response:`, belongs to the prompt: else the base model would
        lose for not knowing it, and the tuned one win for repeating it.

        Of a conversation it is everything before the last assistant message, which is the reference.

        Raises:
            DataError: the chat template refuses the conversation.
        """
        if self._chat is None:
            text, reference = row["input"], row["output"]
            if reference.startswith(self._opening):
                text, reference = text + self._opening, reference.removeprefix(self._opening)
        else:
            messages = row["messages"]
            turns = [i for i in range(1, len(messages)) if messages[i]["role"] == "assistant"]
            if not turns:
                return None
            text = self._chat.render_prompt(messages[: turns[-1]], row.get("tools"))
            reference = messages[turns[-1]]["content"]
        if not text.removesuffix(self._opening) or not reference.strip():
            return None
        return Prompt(text, tuple(self._encoder.encode_prompt(text)), reference)

    def end_tokens(self, rows: Iterable[dict[str, Any]]) -> set[int]:
        """Return the tokens that end these rows' trained text: what the model has learned to stop with."""
        ends = set()
        for row in rows:
            for example in self._encoder.encode(row):
                ends.add(example.input_ids[-1])
        return ends


def opening_of(output_template: str) -> str:
    """Return the fixed text before the first placeholder, without blanks at its end.

    A blank belongs to the token after it, which the answer begins with.
    """
    pieces = parse_template(output_template, "output_template").pieces
    fixed = takewhile(lambda piece: piece[1] is None, pieces)
    return "".join(literal for literal, _ in fixed).rstrip(" ")
