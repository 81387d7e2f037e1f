"""A conversation → its text by the tokenizer's chat template, and the characters of it that are trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.config.data import ROLES
from tunesmith.data.align import Span
from tunesmith.data.encode import MarkedText
from tunesmith.data.formats.base import LEFT_OUT, UNRENDERED_HINT, Findings
from tunesmith.data.formats.chat_template import (
    END_THINK,
    MARK,
    THINK,
    ChatTemplate,
    Messages,
    split_reasoning,
)
from tunesmith.data.formats.conversation import is_answer
from tunesmith.data.formats.turns import (
    Turn,
    answer_start,
    find_changed,
    not_faithful,
    reopen,
    turn_start,
    without,
)
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What is read of a message here; a template may read more.
_KNOWN_KEYS = {"role", "content", "tool_calls"}
_BLOCK = re.compile(rf"{THINK}.*?{END_THINK}\s*", re.DOTALL)


class Question(NamedTuple):
    """A conversation as text up to an answer's end, where the answer starts in it, and what it is compared with."""

    text: str
    start: int
    reference: str


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template, and finds the trained characters.

    `date` (ISO) is the day on which they are held. What the template leaves out is refused, or counted.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        date: str,
        trains_reasoning: bool = True,
        refuses_unrendered: bool = True,
    ) -> None:
        self._template = ChatTemplate(tokenizer, date)
        self._trains_reasoning = trains_reasoning
        self._refuses = refuses_unrendered
        self._is_used = dict.fromkeys(_KNOWN_KEYS, True)
        if self._template.goes_on:
            raise DataError(
                "the chat template begins another turn behind each answer, so that answers would be trained with it",
                "give --chat_template a template that does so with add_generation_prompt alone",
            )

    @property
    def date(self) -> str | None:
        """The date that the texts name, None where they name none."""
        return self._template.date

    def render(self, row: dict[str, Any], findings: Findings) -> list[MarkedText]:
        """Return the examples of one conversation.

        A trained turn runs from the end of its generation prompt to its end-of-turn token. If every
        prefix of the conversation renders as a prefix of the whole, the conversation is one example;
        otherwise each trained turn is one, rendered as the last turn that inference would see. An
        assistant message that opens the conversation answers nothing, and is context only.

        Raises:
            DataError: the template refuses the conversation, leaves a part of it out, or can't be trained faithfully.
        """
        messages, tools = self._adapt(row["messages"]), row.get("tools")
        self._note_keys(messages, findings)
        if row.get("trained") == "all":
            return self._render_everything(messages, tools, row.get("untrained", []), findings)
        turns = _trained_turns(row)
        rendered = [self._render_turn(messages, tools, turn) for turn in turns]
        if turns:
            self._check_whole(messages[: turns[-1] + 1], tools, rendered[-1], findings)
        examples = [
            # Behind others' turns no end token belongs where the template writes none.
            MarkedText(
                turn.text,
                self._trained_spans(turn, messages[index]),
                turn.ends or messages[index]["role"] != "assistant",
            )
            for index, turn in zip(turns, rendered, strict=True)
            if _says_something(messages[index]) and turn.said.strip()
        ]
        if _continue_each_other(examples):
            spans = tuple([span for example in examples for span in example.spans])
            return [MarkedText(examples[-1].text, spans, examples[-1].ends)]
        return examples

    def last_question(self, row: dict[str, Any]) -> Question | None:
        """Return what is before the last trained answer, and that answer; None if there is none, or it is empty.

        Raises:
            DataError: the template refuses the conversation, or can't be trained faithfully.
        """
        messages = self._adapt(row["messages"])
        answers = [turn for turn in _trained_turns(row) if is_answer(row["messages"], turn)]
        if not answers:
            return None
        turn = self._render_turn(messages, row.get("tools"), answers[-1])
        reference = row["messages"][answers[-1]]["content"]
        if messages[answers[-1]].get("tool_calls"):
            reference = turn.said
        return Question(turn.text, turn.start, reference) if turn.start and reference.strip() else None

    def _adapt(self, messages: Messages) -> Messages:
        """Return the messages as the template knows them; an end token that an answer brings is left to the template."""
        adapted = self._template.adapt(messages)
        for index, message in enumerate(adapted):
            content = message["content"].rstrip()
            if message["role"] == "assistant" and (token := self._end_token(content)):
                adapted[index] = {**message, "content": content.removesuffix(token)}
        return adapted

    def _end_token(self, text: str, start: int = 0) -> str:
        """Return the special token that a text ends with, from `start` on; "" if with none."""
        return next((token for token in self._template.special_tokens if text.endswith(token, start)), "")

    def _render_turn(self, messages: Messages, tools: Any, turn: int) -> Turn:
        """Return the conversation up to this turn's end token."""
        apply = self._template.apply
        text = apply(messages[: turn + 1], tools, add_generation_prompt=False)
        if is_answer(messages, turn):
            prompt = apply(messages[:turn], tools, add_generation_prompt=True)
            reasoning, answer = split_reasoning(messages[turn])
            if reasoning and self._template.opens_reasoning:
                text, start = reopen(prompt, text, messages[turn], turn)
            else:
                start = turn_start(prompt, text, answer or reasoning, turn)
        else:
            start = self._content_start(messages[: turn + 1], tools, text)
        return self._end_turn(text, start)

    def _content_start(self, messages: Messages, tools: Any, text: str) -> int:
        """Return where the content of the last message begins in `text`, found by what stands there in its place."""
        marked = self._template.apply(
            [*messages[:-1], {**messages[-1], "content": MARK}], tools, add_generation_prompt=False
        )
        start = marked.rfind(MARK)
        if (
            start < 0
            or marked[:start] != text[:start]
            or not text.startswith(messages[-1]["content"].strip(), start)
        ):
            raise DataError(
                f"the chat template renders message {len(messages)} otherwise than it is written, so it can't be trained",
                "use another chat template, or leave the message untrained",
            )
        return start

    def _end_turn(self, text: str, start: int) -> Turn:
        """Return the turn that begins at `start`, up to the end token behind which there is white space alone."""
        whole = text.rstrip()
        token = self._end_token(whole, start)
        return Turn(whole, start, len(whole) - len(token)) if token else Turn(text, start, len(text))

    def _render_everything(
        self, messages: Messages, tools: Any, untrained: Sequence[int], findings: Findings
    ) -> list[MarkedText]:
        text = self._template.apply(messages, tools, add_generation_prompt=False)
        turn = self._end_turn(text, 0)
        self._check_whole(messages, tools, turn, findings)
        spans: Sequence[Span] = [(0, len(turn.text))]
        for index in untrained:
            before, behind = (
                self._template.apply(messages[:stop], tools, add_generation_prompt=False) if stop else ""
                for stop in (index, index + 1)
            )
            if not (text.startswith(before) and text.startswith(behind)):
                raise not_faithful(index)
            spans = without(spans, (len(before), len(behind)))
        if not self._trains_reasoning:
            for block in _BLOCK.finditer(turn.text):
                spans = without(spans, block.span())
        return [MarkedText(turn.text, tuple(spans), turn.ends)] if spans else []

    def _trained_spans(self, turn: Turn, message: Mapping[str, Any]) -> tuple[Span, ...]:
        start = turn.start if self._trains_reasoning else answer_start(turn, message)
        return ((start, len(turn.text)),)

    def _note_keys(self, messages: Messages, findings: Findings) -> None:
        """Count the keys of messages that nothing uses, and the roles that nothing knows."""
        for message in messages:
            role = message["role"]
            if role not in ROLES and not self._template.mentions(role):
                findings[
                    f"messages of the role `{role}`, which isn't known: role_names says what it means"
                ] += 1
            for key in message:
                if key not in self._is_used:
                    self._is_used[key] = self._template.mentions(key)
                if not self._is_used[key]:
                    findings[
                        f"messages with the key `{key}`, which neither this program nor the chat template uses"
                    ] += 1

    def _check_whole(self, messages: Messages, tools: Any, turn: Turn, findings: Findings) -> None:
        """Refuse or count what was given and didn't come out.

        Raises:
            DataError: something is left out, and that isn't to be counted.
        """
        left_out = list(self._template.find_unrendered(messages, tools))
        if not left_out:
            left_out = list(find_changed(messages, turn))
        if left_out and self._refuses:
            raise DataError(f"the chat template leaves out {left_out[0]}", UNRENDERED_HINT)
        for what in left_out:
            findings[f"{LEFT_OUT} {what}"] += 1


def _says_something(message: Mapping[str, Any]) -> bool:
    """Tell whether there is anything to learn: a template may write something into an empty answer too."""
    reasoning, answer = split_reasoning(message)
    return bool(answer.strip() or reasoning.strip() or message.get("tool_calls"))


def _trained_turns(row: dict[str, Any]) -> list[int]:
    messages = row["messages"]
    turns = row.get("trained")
    if turns is None or turns == "all":
        untrained = row.get("untrained", [])
        return [i for i in range(len(messages)) if is_answer(messages, i) and i not in untrained]
    return list(turns)


def _continue_each_other(examples: Sequence[MarkedText]) -> bool:
    """Tell whether all but the last are beginnings of the last, each with its own end token."""
    return len(examples) > 1 and all(
        example.ends and examples[-1].text.startswith(example.text) for example in examples[:-1]
    )
