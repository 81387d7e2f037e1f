"""A tokenizer's chat template: what it makes of a conversation, and what it knows of it.

What a template knows is found by giving it texts that stand nowhere else, and looking for them in what comes out.
"""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = Sequence[Mapping[str, Any]]

# Where models keep their reasoning: Qwen3 and vLLM, gpt-oss, OpenRouter.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_KEYS = frozenset(REASONING_KEYS)
THINK, END_THINK = "<think>", "</think>"
# Models that are asked with an open block begin behind its opening.
_INLINE = re.compile(rf"\s*(?:{THINK})?(?P<reasoning>.*?){END_THINK}\s*(?P<answer>.*)", re.DOTALL)
_OTHER_ROLES = {"function": "tool", "developer": "system"}
# A text that stands nowhere else.
MARK = "Qmark4"
_USER = {"role": "user", "content": "Qmark1"}


def split_reasoning(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return the reasoning of an assistant's message, "" if it has none, and its answer."""
    content = message["content"]
    if END_THINK not in content and _KEYS.isdisjoint(message):
        return "", content
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            return message[key], content
    found = _INLINE.fullmatch(content)
    return (found["reasoning"].strip("\n"), found["answer"]) if found else ("", content)


class ChatTemplate:
    """Renders conversations as the model's own chat template does, on one `date` (ISO)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, date: str) -> None:
        self._tokenizer = copy.copy(tokenizer)
        template = tokenizer.chat_template
        self._source = "\n".join(template.values()) if isinstance(template, dict) else str(template)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = tuple(
            sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        )
        """The special tokens as text, the longest first."""
        self._today = datetime.datetime.fromisoformat(date)
        self._unrendered: dict[Any, list[str]] = {}
        # Some templates read the text of a message from a list of parts alone.
        self._takes_parts = False
        asked = [_USER, _answer("Qmark2")]
        if not self._shows(asked, "Qmark1", "Qmark2"):
            self._takes_parts = True
            self._takes_parts = self._shows(asked, "Qmark1", "Qmark2")

    @property
    def date(self) -> str | None:
        """The date that the texts name, if the template asks for one."""
        return self._today.date().isoformat() if "strftime_now" in self._source else None

    def mentions(self, key: str) -> bool:
        """Tell whether the template speaks of this key of a message."""
        return re.search(rf"\b{re.escape(key)}\b", self._source) is not None

    def apply(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> str:
        """Return the text of `adapted` messages.

        Raises:
            DataError: the template refuses them.
        """
        if self._takes_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **({"strftime_now": self._today.strftime} if self.date else {}),
            )
        except Exception as error:  # a template may fail in any way
            roles = ", ".join(f"`{message['role']}`" for message in messages)
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                f"its roles are {roles}; check that the model's template knows them in this order",
            ) from error
        assert isinstance(text, str)
        return text

    def adapt(self, messages: Messages) -> list[Mapping[str, Any]]:
        """Return the messages with roles and reasoning under the names that the template knows."""
        return [self._adapt(message) for message in messages]

    def _adapt(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        role = message["role"]
        if role in _OTHER_ROLES:
            return {**message, "role": self._role_for[role]}
        if role != "assistant":
            return message
        reasoning, answer = split_reasoning(message)
        if self._reasoning_key is None or message.get(self._reasoning_key):
            return message
        if not reasoning.strip():
            # Of an empty block the template writes its own.
            return message if answer == message["content"] else {**message, "content": answer}
        others = {key: value for key, value in message.items() if key not in REASONING_KEYS}
        return {**others, "content": answer, self._reasoning_key: reasoning}

    @cached_property
    def goes_on(self) -> bool:
        """True for a template that writes the next generation prompt behind an answer, whether it is asked to or not."""
        text = self._try([_USER, _answer("Qmark2")]) or ""
        _, answered, behind = text.rpartition("Qmark2")
        rest = behind
        for token in self.special_tokens:
            rest = rest.replace(token, "")
        return bool(answered and rest.strip()) and rest != behind

    @cached_property
    def _role_for(self) -> dict[str, str]:
        """The name that the template has for each role that goes by two."""
        return {role: self._known_role(role, other) for role, other in _OTHER_ROLES.items()}

    def _known_role(self, role: str, other: str) -> str:
        for name in (role, other):
            message = {"role": name, "content": "Qmark2", "name": "f", "tool_call_id": "a1b2c3d4e"}
            messages = [message, _USER] if other == "system" else [_USER, _answer("Qmark3"), message]
            if self.mentions(name) and self._shows(messages, "Qmark2"):
                return name
        return role

    @cached_property
    def _reasoning_key(self) -> str | None:
        """The key under which the template looks for reasoning."""
        for key in REASONING_KEYS:
            answered = {**_answer("Qmark2"), key: "Qmark3"}
            if self.mentions(key) and self._shows([_USER, answered], "Qmark2", "Qmark3"):
                return key
        return None

    @cached_property
    def opens_reasoning(self) -> bool:
        """True for a template that begins the reasoning in its generation prompt, and takes it out of finished turns."""
        inline = _answer(f"{THINK}\nQmark3\n{END_THINK}\n\nQmark2")
        if self._reasoning_key is not None or self._shows([_USER, inline], "Qmark3"):
            return False
        prompt = self._try([_USER], add_generation_prompt=True)
        return prompt is not None and prompt.rstrip().endswith(THINK)

    def _shows(self, messages: Messages, *marks: str) -> bool:
        text = self._try(messages)
        return text is not None and all(mark in text for mark in marks)

    def _try(self, messages: Messages, tools: Any = None, add_generation_prompt: bool = False) -> str | None:
        try:
            return self.apply(messages, tools, add_generation_prompt)
        except DataError:
            return None

    def find_unrendered(self, messages: Messages, tools: Any) -> list[str]:
        """Return what of a conversation of this shape the template leaves out, in words."""
        shape = (*map(_shape_of, messages), bool(tools))
        if shape not in self._unrendered:
            self._unrendered[shape] = self._compare(messages, bool(tools))
        return self._unrendered[shape]

    def _compare(self, messages: Messages, has_tools: bool) -> list[str]:
        marked = [_mark(message, i) for i, message in enumerate(messages)]
        tools = [_MARKED_TOOL] if has_tools else None
        text = self._try(marked, tools)
        if text is None:
            return []
        # Whether it is there; whether it is there as it is written, the row's own text tells.
        shown = text.lower()
        left_out: list[str] = []
        for i, message in enumerate(marked):
            mark, role, calls = f"qmark{i}x", message["role"], message.get("tool_calls") or []
            others = [*marked[:i], *marked[i + 1 :]]
            if message["content"] and mark not in shown:
                left_out.append(f"the text of {with_article(role)} message")
            elif any(f"qcall{i}x{j}" not in shown for j in range(len(calls))):
                left_out.append("a tool call")
            elif not message["content"] and not calls and others and self._try(others, tools) == text:
                left_out.append(f"an empty `{role}` message")
        if has_tools and "qmarkt" not in shown:
            left_out.append("the list of tools")
        return left_out


_MARKED_TOOL = {
    "type": "function",
    "function": {"name": "qmarkt", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


def _shape_of(message: Mapping[str, Any]) -> tuple[Any, ...]:
    calls = message.get("tool_calls")
    return message["role"], bool(message["content"].strip()), tuple(map(frozenset, calls or ()))


def _mark(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a message of the same shape whose texts stand nowhere else, by its number in the conversation."""
    marked = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    marked["content"] = f"qmark{number}x" if message["content"].strip() else ""
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [_mark_call(call, f"qcall{number}x{j}") for j, call in enumerate(calls)]
    return marked


def _mark_call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def with_article(role: str) -> str:
    """Return a role as an error names it: an `assistant`, a `user`."""
    return f"{'an' if role == 'assistant' else 'a'} `{role}`"
