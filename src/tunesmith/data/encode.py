"""A rendered row → token ids, and which of them are trained.

Labels come from where the tokens of one tokenization lie in the whole text. A token is trained if its
characters end after the prompt's end: one that spans prompt and completion is trained. The first token of
an example never is, because nothing precedes it that could predict it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.align import Aligned, Aligner, Span
from tunesmith.data.templates import Kind
from tunesmith.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Encoded:
    """One example: its token ids, and the runs of them that are trained, each its first and the one after it."""

    input_ids: list[int]
    spans: list[Span]

    @property
    def trained(self) -> list[bool]:
        """Whether each token is trained."""
        trained = [False] * len(self.input_ids)
        for begin, stop in self.spans:
            trained[begin:stop] = [True] * (stop - begin)
        return trained


@dataclass(frozen=True)
class Rendered:
    """The text of one example; the characters in `spans` are trained. `ends`: the text has its own end token."""

    text: str
    spans: tuple[Span, ...]
    ends: bool


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
    """Check that rows of this kind can be labelled with this tokenizer.

    Raises:
        ModelError: it gives no character offsets or has no end token.
        DataError: the rows are conversations, and it has no chat template.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer of `{name}` gives no character offsets, which the labels come from",
            "use a model that ships a fast tokenizer (tokenizer.json)",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of `{name}` has no end token, so the model could not learn to stop",
            "set `eos_token` in the model's tokenizer_config.json",
        )
    if kind == "messages" and not tokenizer.chat_template:
        raise DataError(
            f"the rows are conversations, and the tokenizer of `{name}` has no chat template",
            "use an instruct model, add a chat_template to its tokenizer, or give input_template and output_template",
        )


def tokenizer_content(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return everything that decides what the tokenizer makes of a text, as canonical JSON."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # What an earlier call may have left behind; it isn't the tokenizer's own.
    backend["truncation"] = backend["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([backend, tokenizer.chat_template, special], sort_keys=True)


class Encoder:
    """Encodes rendered rows of one kind. Examples come back whole: truncation is the caller's."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
        check_tokenizer(tokenizer, kind)
        self.kind = kind
        self._eos_id = int(tokenizer.eos_token_id)
        # A chat template writes the special tokens itself.
        self._aligner = Aligner(tokenizer, add_special_tokens=kind != "messages")
        self._chat = ChatRenderer(tokenizer) if kind == "messages" else None

    def encode(self, row: dict[str, Any]) -> list[Encoded]:
        """Return the examples of one rendered row."""
        return next(self.encode_batch([row]))

    def encode_batch(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[Encoded]]:
        """Render the rows, then yield the examples of each as they are asked for: none if nothing of it is trained.

        Raises:
            RowError: the chat template can't render the row.
        """
        rendered = [self._render(row, index) for index, row in enumerate(rows)]
        texts = [example for row in rendered for example in row]
        aligned = self._aligner.align(
            [example.text for example in texts], [example.spans for example in texts]
        )
        return ([self._label(example, next(aligned)) for example in row] for row in rendered)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids [P] of a prompt: with what the tokenizer puts before a text, not after it."""
        return self._aligner.encode_prompt(text)

    def _render(self, row: dict[str, Any], index: int) -> list[Rendered]:
        if self._chat is None:
            prompt, completion = row["input"], row["output"]
            # An empty completion would teach the model to stop at once.
            if not completion:
                return []
            text = prompt + completion
            return [Rendered(text, ((len(prompt), len(text)),), ends=False)]
        try:
            return self._chat.render(row)
        except DataError as error:
            raise RowError(error.message, error.hint, index) from error

    def _label(self, example: Rendered, aligned: Aligned) -> Encoded:
        ids, spans = aligned.input_ids, aligned.spans
        if not example.ends:
            # The end token may be there already: the tokenizer adds it, or the text ends in it.
            is_last_trained = bool(spans) and spans[-1][1] == len(ids)
            if ids[-1:] != [self._eos_id] or not (aligned.is_last_added or is_last_trained):
                ids.append(self._eos_id)
            spans.append((len(ids) - 1, len(ids)))
        return Encoded(ids, [(max(begin, 1), stop) for begin, stop in spans if stop > 1])


class RowError(DataError):
    """A DataError about the row at `index` of the batch."""

    def __init__(self, message: str, hint: str | None, index: int) -> None:
        super().__init__(message, hint)
        self.index = index


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template, and finds the trained characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = copy.copy(tokenizer)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=len, reverse=True)
        self._end_of_turn = re.compile("(?:" + "|".join(map(re.escape, longest_first)) + r")(?=\s*\Z)")

    def render(self, row: dict[str, Any]) -> list[Rendered]:
        """Return the examples of one conversation.

        A trained turn runs from the end of its generation prompt to its end-of-turn token. If every
        prefix of the conversation renders as a prefix of the whole, the conversation is one example;
        otherwise each assistant turn is one, rendered as the last turn that inference would see. An
        assistant message that opens the conversation answers nothing, and is context only.

        Raises:
            DataError: the template refuses the conversation, or can't be trained faithfully.
        """
        messages, tools = row["messages"], row.get("tools")
        turns = [i for i in range(1, len(messages)) if messages[i]["role"] == "assistant"]
        rendered = (self._render_turn(messages, i, tools) for i in turns)
        examples = [example for example in rendered if example is not None]
        if _continue_each_other(examples):
            spans = tuple(span for example in examples for span in example.spans)
            return [Rendered(examples[-1].text, spans, examples[-1].ends)]
        return examples

    def render_prompt(self, messages: list[dict[str, Any]], tools: Any) -> str:
        """Return the text that asks for the next assistant turn.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._apply(messages, tools, add_generation_prompt=True)

    def _render_turn(self, messages: list[dict[str, Any]], turn: int, tools: Any) -> Rendered | None:
        """Return the conversation up to this assistant turn's end token, None if the turn is empty."""
        prompt = self.render_prompt(messages[:turn], tools)
        text = self._apply(messages[: turn + 1], tools, add_generation_prompt=False)
        start = _turn_start(prompt, text, messages[turn]["content"], turn)
        found = self._end_of_turn.search(text, start)
        end_of_content = found.start() if found else len(text)
        if not text[start:end_of_content].strip():
            return None
        end = found.end() if found else len(text)
        return Rendered(text[:end], ((start, end),), ends=found is not None)

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


def _continue_each_other(examples: Sequence[Rendered]) -> bool:
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
    parts = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(text))
    content = content.strip()
    start = text.rfind(content, max(0, parts - len(content) + 1), parts + len(content)) if content else -1
    if start < 0:
        raise DataError(
            f"the chat template renders message {turn + 1} otherwise than its generation prompt begins it, "
            "so it can't be trained faithfully",
            "use another chat template, or give input_template and output_template",
        )
    return start
