"""What of a generated or an expected text is compared: the answer, without its reasoning and without special tokens.

Answers and references are read by the same rules. Known are think blocks of several spellings, whether the answer or
its prompt opens them, and the channels of gpt-oss (https://cookbook.openai.com/articles/openai-harmony).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.data.formats.chat_template import END_THINK, REASONING_KEYS, THINK, ChatTemplate
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Qwen's, DeepSeek's and their kin's; Mistral's, Seed-OSS's, Command's, Kimi's, EXAONE's.
_BLOCKS = (
    (THINK, END_THINK),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<thought>", "</thought>"),
)
_CHANNEL, _START, _MESSAGE = "<|channel|>", "<|start|>", "<|message|>"
_END_OF_MESSAGE = re.compile(r"<\|(?:end|call|return)\|>")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
# Special tokens that a tool call is written with: [TOOL_CALLS], <|python_tag|>, <|tool_call_begin|>.
_OF_CALLS = re.compile(r"(?i)tool|call|func|python_tag|args|arg_|param")


@dataclass(frozen=True)
class Answer:
    """A text to compare, and the reasoning before it; not `ended`: the reasoning was never left, so that there is no text."""

    text: str
    reasoning: str = ""
    ended: bool = True


class AnswerReader:
    """Reads what models say and what rows expect of them, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._of_calls = [token for token in special if _OF_CALLS.search(token)]
        dropped = [token for token in special if token not in self._of_calls]
        self._dropped = re.compile("|".join(map(re.escape, dropped)) or "(?!)")
        self._blocks = [*_BLOCKS, *filter(lambda block: block not in _BLOCKS, _learn_blocks(tokenizer))]

    def read_generated(self, token_ids: Sequence[int], prompt: str) -> Answer:
        """Return the answer that was generated behind `prompt`."""
        said = str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
        if self._dropped.search(said) and not self._has_marks(said):
            said = str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
        return self._read(said, prompt)

    def read_reference(self, text: str, prompt: str) -> Answer:
        """Return the expected answer; one that is written without the block that its prompt opens is no reasoning."""
        continues = any(close in text for _, close in self._blocks)
        return self._read(text, prompt if continues else "")

    def _read(self, said: str, prompt: str) -> Answer:
        if _CHANNEL in said:
            return self._read_channels(said)
        for opening, close in self._blocks:
            before, is_closed, _ = said.partition(close)
            is_inside = (
                said.lstrip().startswith(opening)
                or prompt.rstrip().endswith(opening)
                # Some are asked with an open block, which stands in no text here.
                or (is_closed and opening not in before and (opening, close) in _BLOCKS)
            )
            if is_inside:
                return self._read_block(said, opening, close)
        return Answer(self._clean(said))

    def _read_block(self, said: str, opening: str, close: str) -> Answer:
        parts, rest = [], said.lstrip().removeprefix(opening)
        while True:
            reasoning, is_closed, rest = rest.partition(close)
            parts.append(self._clean(reasoning).strip())
            if not is_closed:
                return Answer("", "\n\n".join(filter(None, parts)), ended=False)
            if not rest.lstrip().startswith(opening):
                break
            rest = rest.lstrip().removeprefix(opening)
        return Answer(self._clean(rest.lstrip()), "\n\n".join(filter(None, parts)))

    def _read_channels(self, said: str) -> Answer:
        """Read gpt-oss's messages: analysis is reasoning, final and commentary are said, a recipient is called."""
        reasoning, texts = [], []
        for message in said.split(_START):
            header, is_whole, body = message.partition(_MESSAGE)
            if not is_whole:
                # What stands before the first message, if anything; a header that was cut off says nothing.
                texts.append(self._clean(header.partition(_CHANNEL)[0]).strip() if message is said else "")
                continue
            body = _END_OF_MESSAGE.split(body)[0]
            recipient = _RECIPIENT.search(header)
            channel = header.rpartition(_CHANNEL)[2].strip()
            if recipient is not None:
                texts.append(_write_call(recipient[1], body))
            elif channel.startswith("analysis"):
                reasoning.append(self._clean(body).strip())
            else:
                texts.append(self._clean(body))
        said_texts = [text for text in texts if text.strip()]
        return Answer("\n".join(said_texts), "\n\n".join(filter(None, reasoning)), ended=bool(said_texts))

    def _has_marks(self, said: str) -> bool:
        """Tell whether special tokens may say which part of a text is what."""
        marks = (_CHANNEL, *(mark for block in self._blocks for mark in block), *self._of_calls)
        return any(mark in said for mark in marks)

    def _clean(self, text: str) -> str:
        return self._dropped.sub("", text)


def _learn_blocks(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str]]:
    """Yield what the chat template writes before and behind the reasoning that a message brings under a key of its own."""
    if not tokenizer.chat_template:
        return
    template = ChatTemplate(tokenizer, "2000-01-01")
    asked = {"role": "user", "content": "Qmark1"}
    for key in filter(template.mentions, REASONING_KEYS):
        answer = {"role": "assistant", "content": "Qmark2", key: "Qmark3"}
        try:
            prompt = template.apply([asked], None, add_generation_prompt=True)
            said = template.apply([asked, answer], None, add_generation_prompt=False)
        except DataError:
            continue
        found = re.search(r"(?P<opening>.*)Qmark3(?P<close>.*?)Qmark2", said.removeprefix(prompt), re.DOTALL)
        marks = (found["opening"].strip(), found["close"].strip()) if found else ("", "")
        if said.startswith(prompt) and all(marks) and _CHANNEL not in marks[0]:
            yield marks


def _write_call(name: str, body: str) -> str:
    try:
        return json.dumps({"name": name, "arguments": json.loads(body)}, ensure_ascii=False)
    except ValueError:
        return f"{name} {body.strip()}"
