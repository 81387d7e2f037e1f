"""A conversation → its text by the tokenizer's chat template, and the characters of it that are trained."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.data.encode import MarkedText
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        otherwise each assistant turn is one, rendered as the last turn that inference would see. An
        assistant message that opens the conversation answers nothing, and is context only.

        Raises:
            DataError: the template refuses the conversation, or can't be trained faithfully.
        """
        messages, tools = row["messages"], row.get("tools")
        turns = [i for i in range(1, len(messages)) if messages[i]["role"] == "assistant"]
        rendered = [self._render_turn(messages, i, tools) for i in turns]
        examples = [example for example in rendered if example is not None]
        if _continue_each_other(examples):
            spans = tuple([span for example in examples for span in example.spans])
            return [MarkedText(examples[-1].text, spans, examples[-1].ends)]
        return examples

    def render_prompt(self, messages: list[dict[str, Any]], tools: Any) -> str:
        """Return the text that asks for the next assistant turn.

        Raises:
            DataError: the template refuses the conversation.
        """
        return self._apply(messages, tools, add_generation_prompt=True)

    def _render_turn(self, messages: list[dict[str, Any]], turn: int, tools: Any) -> MarkedText | None:
        """Return the conversation up to this assistant turn's end token, None if the turn is empty."""
        prompt = self.render_prompt(messages[:turn], tools)
        text = self._apply(messages[: turn + 1], tools, add_generation_prompt=False)
        start = _turn_start(prompt, text, messages[turn]["content"], turn)
        found = self._end_of_turn.search(text, start)
        end_of_content = found.start() if found else len(text)
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
