"""A conversation → its text by the tokenizer's chat template, and the characters of it that are trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data.encode import MarkedText
from tunesmith.data.formats.conversation import is_answer
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Question(NamedTuple):
    """A prompt as text, and the answer that is expected after it."""

    text: str
    reference: str


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template, and finds the trained characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = copy.copy(tokenizer)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=len, reverse=True)
        self._end_of_turn = re.compile("(?:" + "|".join(map(re.escape, longest_first)) + r")(?=\s*\Z)")

    def render(self, row: dict[str, Any]) -> list[MarkedText]:
        """Return the examples of one conversation.

        A trained turn runs from the end of its generation prompt to its end-of-turn token. If every
        prefix of the conversation renders as a prefix of the whole, the conversation is one example;
        otherwise each trained turn is one, rendered as the last turn that inference would see. An
        assistant message that opens the conversation answers nothing, and is context only.

        Raises:
            DataError: the template refuses the conversation, or can't be trained faithfully.
        """
        rendered = [self._render_turn(row, turn) for turn in _trained_turns(row)]
        examples = [example for example in rendered if example is not None]
        if _continue_each_other(examples):
            spans = tuple([span for example in examples for span in example.spans])
            return [MarkedText(examples[-1].text, spans, examples[-1].ends)]
        return examples

    def last_question(self, row: dict[str, Any]) -> Question | None:
        """Return what is before the last trained answer, and that answer; None if there is none, or it is empty.

        Raises:
            DataError: the template refuses the conversation, or can't be trained faithfully.
        """
        messages = row["messages"]
        answers = [turn for turn in _trained_turns(row) if is_answer(messages, turn)]
        if not answers:
            return None
        text = self._prompt(row, answers[-1])
        reference = messages[answers[-1]]["content"]
        if messages[answers[-1]].get("tool_calls"):
            turn = self._render_turn(row, answers[-1])
            reference = "" if turn is None else self._end_of_turn.sub("", turn.text[turn.spans[0][0] :])
        return Question(text, reference) if text and reference.strip() else None

    def _prompt(self, row: dict[str, Any], turn: int) -> str:
        """Return the text that asks for this assistant turn."""
        return self._apply(row["messages"][:turn], row.get("tools"), add_generation_prompt=True)

    def _render_turn(self, row: dict[str, Any], turn: int) -> MarkedText | None:
        """Return the conversation up to this turn's end token, None if the turn is empty."""
        messages, tools = row["messages"], row.get("tools")
        text = self._apply(messages[: turn + 1], tools, add_generation_prompt=False)
        content = messages[turn]["content"]
        if is_answer(messages, turn):
            start = _turn_start(self._prompt(row, turn), text, content, turn)
        else:
            before = self._apply(messages[:turn], tools, add_generation_prompt=False) if turn else ""
            start = _content_start(before, text, content, turn)
        found = self._end_of_turn.search(text, start)
        end_of_content = found.start() if found else len(text)
        _check_calls(messages[turn], text[start:end_of_content], turn)
        if not text[start:end_of_content].strip():
            return None
        end = found.end() if found else len(text)
        return MarkedText(text[:end], ((start, end),), ends=found is not None)

    def _apply(self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(f"`{message['role']}`" for message in messages)
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                f"its roles are {roles}; check that the model's template knows them in this order",
            ) from error
        assert isinstance(text, str)
        return text


def _trained_turns(row: dict[str, Any]) -> list[int]:
    messages = row["messages"]
    turns = row.get("trained")
    return [i for i in range(len(messages)) if is_answer(messages, i)] if turns is None else list(turns)


def _check_calls(message: dict[str, Any], rendered: str, turn: int) -> None:
    """Refuse a template that leaves a call out: the model would learn to end its turn instead of calling."""
    for call in message.get("tool_calls", []):
        name = call.get("function", call).get("name")
        if str(name) not in rendered:
            raise DataError(
                f"the chat template doesn't render the call of `{name}` in message {turn + 1}",
                "use a model whose chat template knows tool calls, or leave such rows out",
            )


def _continue_each_other(examples: Sequence[MarkedText]) -> bool:
    """Tell whether all but the last are beginnings of the last, each with its own end token."""
    return len(examples) > 1 and all(
        example.ends and examples[-1].text.startswith(example.text) for example in examples[:-1]
    )


def _turn_start(prompt: str, text: str, content: str, turn: int) -> int:
    """Return where the trained characters of `text` begin: at the end of `prompt`, the generation prompt.

    Some templates open a block in the generation prompt that they leave out of finished turns. There the
    turn begins with its content, if that stands just where the two texts part.
    """
    if text.startswith(prompt):
        return len(prompt)
    parts = _part_at(prompt, text)
    content = content.strip()
    start = text.rfind(content, max(0, parts - len(content) + 1), parts + len(content)) if content else -1
    if start < 0:
        raise DataError(
            f"the chat template renders message {turn + 1} otherwise than its generation prompt begins it, "
            "so it can't be trained faithfully",
            "use another chat template, or give input_template and output_template",
        )
    return start


def _content_start(before: str, text: str, content: str, turn: int) -> int:
    """Return where the content of a message that no generation prompt opens begins in `text`."""
    start = text.find(content.strip(), _part_at(before, text))
    if start < 0:
        raise DataError(
            f"the chat template renders message {turn + 1} otherwise than it is written, so it can't be trained",
            "use another chat template, or leave the message untrained",
        )
    return start


def _part_at(one: str, other: str) -> int:
    """Return the index of the first character in which the texts differ."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
