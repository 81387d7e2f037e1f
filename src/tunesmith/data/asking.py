"""What a person says → the prompt that the training would have made of it.

A trained prompt ends where its row's first trained token begins, which the answer has a say in: a blank before it
belongs to the answer's first token in one tokenizer and stands alone in another, and some chat templates open a block
for reasoning where there is some. So the question is made a row with the answers of rows that were trained, and of the
prompts that come of it the one is taken that is a beginning of the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.data.encode import TextEncoder
from tunesmith.data.formats import Findings, Prompt, RenderedRow, RowFormat
from tunesmith.data.formats.chat_template import REASONING_KEYS
from tunesmith.data.formats.conversation import is_answer
from tunesmith.data.formats.messages import MessagesFormat
from tunesmith.data.formats.template import TemplateFormat
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]
Said = Mapping[str, str]
"""What a person says, by the names of `Questions.fields`."""

# How many characters of an answer have a say in where the prompt ends.
_BEGINNING = 32
# What fewer of the answers than one of so many ask for is an exception.
_RARE = 8
# Of a model whose rows aren't known; one that reasons is asked to.
_ANSWER: Message = {"role": "assistant", "content": "Yes.", "reasoning_content": "Well."}
_QUESTION: Message = {"role": "user", "content": "Why?"}
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Exchange:
    """A question and what was answered to it."""

    said: Said
    answer: str


class Questions(Protocol):
    """How a model is asked, in the way that its rows were trained.

    `fields` are the names of what a question is made of, `end_tokens` those that a trained answer ends with,
    `remembers` tells whether earlier exchanges are part of the prompt.
    """

    fields: tuple[str, ...]
    remembers: bool
    end_tokens: frozenset[int]

    def prompt(self, said: Said, before: Sequence[Exchange] = ()) -> Prompt:
        """Return the prompt of a question; its ids are the beginning of the ids that such a row is trained with.

        Raises:
            DataError: it can't be rendered, or it is empty.
        """


def questions_for(
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerFast,
    trained: Sequence[RenderedRow],
    system_prompt: str | None,
) -> Questions:
    """Return how to ask what was trained on rows of this format, some of which are `trained`.

    `row_format` has its tokenizer. An empty `system_prompt` asks without one; None asks with that of the rows, where
    they all have the same.

    Raises:
        DataError: there is no way to ask with a system prompt, or none to render a question.
    """
    if isinstance(row_format, MessagesFormat):
        return ConversationQuestions(row_format, trained, system_prompt)
    if system_prompt:
        raise DataError(
            f"`system_prompt` is for conversations, and the model was trained on rows of the format {row_format.name}",
            "leave it out",
        )
    if isinstance(row_format, TemplateFormat) and row_format.input_template.names:
        return TemplateQuestions(row_format, trained)
    return Continuations(row_format, tokenizer, trained)


class ConversationQuestions:
    """Asks with messages, through the chat template."""

    fields: tuple[str, ...] = ("user",)
    remembers = True

    def __init__(
        self, row_format: MessagesFormat, trained: Sequence[RenderedRow], system_prompt: str | None
    ) -> None:
        self._format = row_format
        self.system_prompt = _common_system(trained) if system_prompt is None else system_prompt
        self._answers = _distinct(filter(None, map(_last_answer, trained))) or [_ANSWER]
        rows = list(trained) or [{"messages": [_QUESTION, {"role": "assistant", "content": "Yes."}]}]
        self.end_tokens = _end_tokens(row_format, rows)

    def prompt(self, said: Said, before: Sequence[Exchange] = ()) -> Prompt:
        messages = self.messages(said, before)
        return _common(self._ask(messages, answer) for answer in self._answers)

    def messages(self, said: Said, before: Sequence[Exchange] = ()) -> list[Message]:
        """Return the conversation up to the question."""
        messages: list[Message] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": self.system_prompt})
        for exchange in before:
            messages.append({"role": "user", "content": exchange.said["user"]})
            messages.append({"role": "assistant", "content": exchange.answer})
        return [*messages, {"role": "user", "content": said["user"]}]

    def _ask(self, messages: Sequence[Message], answer: Message) -> Prompt:
        asked = self._format.prompt({"messages": [*messages, answer]})
        if asked is None:
            raise DataError("the chat template makes no prompt of a question", "use another chat template")
        return asked


class TemplateQuestions:
    """Asks with one text or several, which fill the input template; every question stands by itself."""

    remembers = False

    def __init__(self, row_format: TemplateFormat, trained: Sequence[RenderedRow]) -> None:
        self._format = row_format
        self.fields = tuple(row_format.input_template.names)
        opening = row_format.output_template.opening
        outputs = [row["output"] for row in trained if row["output"].startswith(opening)]
        beginnings = [
            output[: len(opening) + _BEGINNING] for output in outputs if output[len(opening) :].strip()
        ]
        self._outputs = _distinct(beginnings) or [f"{opening}Yes."]
        rows = list(trained) or [{"input": "Why?", "output": self._outputs[0]}]
        self.end_tokens = _end_tokens(row_format, rows)

    def prompt(self, said: Said, before: Sequence[Exchange] = ()) -> Prompt:
        question = self._format.input_template.fill({name: said.get(name, "") for name in self.fields})
        prompts = [self._format.prompt({"input": question, "output": output}) for output in self._outputs]
        asked = [prompt for prompt in prompts if prompt is not None and prompt.input_ids]
        if not asked:
            raise DataError("the question is empty", "say something")
        return _common(asked)

    def pieces(self) -> list[tuple[str, str | None]]:
        """Return the prompt as literals and placeholders in turn, as a template has them, up to where it ends."""
        pieces = [*self._format.input_template.pieces, (self._format.output_template.opening, None)]
        asked = dict.fromkeys(self.fields, "Why?")
        whole = self._format.input_template.fill(asked) + self._format.output_template.opening
        left = len(whole) - len(self.prompt(asked).text)
        # What the answer's first token takes along of the text before it.
        while left and pieces[-1][1] is None:
            literal = pieces.pop()[0]
            kept = literal[: max(len(literal) - left, 0)]
            left -= len(literal) - len(kept)
            pieces += [(kept, None)] if kept else []
        return pieces


class Continuations:
    """Begins a text for the model to go on with."""

    fields: tuple[str, ...] = ("text",)
    remembers = False

    def __init__(
        self, row_format: RowFormat, tokenizer: PreTrainedTokenizerFast, trained: Sequence[RenderedRow]
    ) -> None:
        self._encoder = TextEncoder(tokenizer)
        self._fixed = ""
        if isinstance(row_format, TemplateFormat):
            self._fixed = row_format.input_template.fill({}) + row_format.output_template.opening
        rows = list(trained) or [{"input": "", "output": f"{self._fixed}Yes."}]
        self.end_tokens = _end_tokens(row_format, rows)

    def prompt(self, said: Said, before: Sequence[Exchange] = ()) -> Prompt:
        text = self._fixed + said["text"]
        # What follows a word mostly begins with a blank; what follows a blank takes it along.
        following = "a" if not text or text[-1:].isspace() else " a"
        shown, ids = self._encoder.split_prompt(text + following, len(text))
        if not ids:
            raise DataError(
                "the text is empty, and the tokenizer begins none by itself", "write its beginning"
            )
        return Prompt(shown, ids, "")


def _end_tokens(row_format: RowFormat, rows: Sequence[RenderedRow]) -> frozenset[int]:
    encoded = row_format.encode(rows, Findings())
    return frozenset(example.segments[0].input_ids[-1] for examples in encoded for example in examples)


def _common(prompts: Iterable[Prompt]) -> Prompt:
    """Return the shortest of the prompts that more than a few answers ask for."""
    by_ids: dict[tuple[int, ...], Prompt] = {}
    counts: Counter[tuple[int, ...]] = Counter()
    for prompt in prompts:
        by_ids.setdefault(prompt.input_ids, prompt)
        counts[prompt.input_ids] += 1
    least = counts.total() / _RARE
    return by_ids[min((ids for ids, count in counts.items() if count >= least), key=len)]


def _last_answer(row: RenderedRow) -> Message | None:
    """Return the last answer of a conversation that says something and calls no tool."""
    messages = row["messages"]
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if is_answer(messages, index) and message["content"].strip() and not message.get("tool_calls"):
            return {key: message[key] for key in ("role", "content", *REASONING_KEYS) if key in message}
    return None


def _common_system(rows: Sequence[RenderedRow]) -> str | None:
    """Return the system prompt that all conversations begin with."""
    firsts = [row["messages"][0] for row in rows]
    texts = {first["content"] if first["role"] in _SYSTEM else None for first in firsts}
    return texts.pop() if len(texts) == 1 else None


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())
