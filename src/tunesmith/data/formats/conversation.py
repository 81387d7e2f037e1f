"""A row's conversation, in the forms that people have, as the chat templates of transformers expect it.

That is OpenAI's form with objects for the arguments of a call, as https://huggingface.co/docs/transformers/chat_extras
says; ShareGPT's `from` and `value` are turned into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.config import HFDatasetConfig
from tunesmith.config.data import ALL_ASSISTANT_TURNS, ALL_TURNS, LAST_ASSISTANT_TURN
from tunesmith.data.formats.base import RenderedRow, chosen_mapping, column_of, is_missing
from tunesmith.data.formats.tool_calls import parse_text, read_calls, read_function_calls, read_tools
from tunesmith.errors import DataError

_HINT = 'a conversation is a list such as [{"role": "user", "content": "…"}, …]'
_KEYS_HINT = f"{_HINT}; message_keys names other keys, as role=speaker,content=text"
_TEXT_PARTS = ("text", "input_text", "output_text")
# Where LLaMA-Factory's rows keep what isn't text.
_MEDIA = ("images", "videos", "audios")
_SHAREGPT_KEYS = (("from", "role"), ("value", "content"))
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_SAME_ROLES = {
    "tool": ("function",),
    "function": ("tool",),
    "system": ("developer",),
    "developer": ("system",),
}
# What a message says about whether it is trained: OpenAI's and Mistral's key, then axolotl's and its kin's.
_TRAINED_KEYS = ("weight", "train", "training", "trainable", "loss")


@dataclass(frozen=True)
class ConversationReader:
    """How the rows of a data set hold their conversations.

    `columns` hold one conversation after the other; of several, only what the last holds is learned. `keys` maps
    `role` and other keys of messages to the rows' own, `roles` the rows' names of roles to the usual ones.
    `train_on` is the setting of that name.
    """

    columns: tuple[str, ...] = ("messages",)
    system_column: str = "system"
    tools_column: str = "tools"
    keys: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str | None = None
    train_on: str = ALL_ASSISTANT_TURNS

    @classmethod
    def from_settings(cls, settings: HFDatasetConfig, columns: tuple[str, ...]) -> ConversationReader:
        """Return the reader for conversations in these columns, called as the settings map them."""
        mapping = chosen_mapping(settings)
        return cls(
            tuple(mapping.get(column, column) for column in columns),
            mapping.get("system", "system"),
            mapping.get("tools", "tools"),
            dict(settings.message_keys),
            settings.roles_by_name,
            settings.system_prompt,
            settings.train_on,
        )

    def identity(self) -> dict[str, Any]:
        """Return what shapes the text besides the columns, without what is at its default."""
        default = ConversationReader()
        names = ("system_column", "tools_column", "keys", "roles", "system_prompt", "train_on")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}

    def read(self, row: Mapping[str, Any], where: str) -> RenderedRow:
        """Return the row's conversation and its tools.

        `trained` lists the messages to train where those aren't every assistant message behind the first message:
        where the messages say so themselves, only the last of several columns is to be learned, or `train_on` asks
        for others. It is `all` where every token is to be trained, but for the messages in `untrained`.

        Raises:
            DataError: it is malformed; the message names the row.
        """
        for column in _MEDIA:
            if row.get(column):
                raise DataError(
                    f"`{column}` of {where} holds something, and only text is trained", "leave such rows out"
                )
        messages: list[dict[str, Any]] = []
        marks: list[bool | None] = []
        for column in self.columns:
            marks = [False if mark is None else mark for mark in marks]
            for message, mark in self._read_column(column, row, where):
                messages.append(message)
                marks.append(mark)
        if (system := self._system_of(row, where)) and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
            marks.insert(0, None)
        rendered: RenderedRow = {"messages": messages, **self._choose_trained(messages, marks)}
        if tools := read_tools(row.get(self.tools_column), where):
            rendered["tools"] = tools
        return rendered

    def _read_column(
        self, column: str, row: Mapping[str, Any], where: str
    ) -> list[tuple[dict[str, Any], bool | None]]:
        listed = column_of(row, column, where)
        if isinstance(listed, str) and listed.lstrip().startswith("["):  # as tables hold lists
            listed = parse_text(listed, f"`{column}` of {where}", _HINT)
        if not isinstance(listed, list) or not listed:
            raise DataError(f"`{column}` of {where} is not a list of messages", _HINT)
        of_column = "" if column == "messages" else f"`{column}`, "
        return [
            self._read_message(message, f"{of_column}message {index} of {where}")
            for index, message in enumerate(listed, start=1)
        ]

    def _system_of(self, row: Mapping[str, Any], where: str) -> str | None:
        """Return what is put before a conversation without a system message."""
        given = row.get(self.system_column)
        text = "" if is_missing(given) else _read_content(given, f"`{self.system_column}` of {where}")
        return text or self.system_prompt

    def _choose_trained(
        self, messages: list[dict[str, Any]], marks: list[bool | None]
    ) -> dict[str, list[int] | str]:
        if self.train_on == ALL_ASSISTANT_TURNS and all(mark is None for mark in marks):
            return {}
        if self.train_on == ALL_TURNS:
            untrained = [index for index, mark in enumerate(marks) if mark is False]
            return {"trained": "all", **({"untrained": untrained} if untrained else {})}
        answers = [index for index in range(len(messages)) if is_answer(messages, index)]
        if self.train_on == ALL_ASSISTANT_TURNS:
            chosen = set(answers)
        elif self.train_on == LAST_ASSISTANT_TURN:
            chosen = set(answers[-1:])
        else:
            roles = {name for role in self.train_on.split(",") for name in (role, *_SAME_ROLES.get(role, ()))}
            chosen = {
                index
                for index, message in enumerate(messages)
                if message["role"] in roles and (message["role"] != "assistant" or index in answers)
            }
        trained = [index for index, mark in enumerate(marks) if (index in chosen if mark is None else mark)]
        return {"trained": trained}

    def _read_message(self, message: Any, place: str) -> tuple[dict[str, Any], bool | None]:
        """Return the message, and whether it says that it is trained."""
        if not isinstance(message, Mapping):
            raise DataError(f"{place} is a {type(message).__name__}, not an object", _HINT)
        message = self._with_usual_keys(message, place)
        # Arrow gives every message every key of any message, as null: a template may test for their presence.
        kept = {key: value for key, value in message.items() if not is_missing(value)}
        if not isinstance(kept.get("role"), str):
            raise DataError(f"{place} has no `role`", _KEYS_HINT)
        if kept.get("tool_calls") == []:
            del kept["tool_calls"]
        if not {"content", "tool_calls", "function_call"} & set(message):
            raise DataError(f"{place} has no `content`", _KEYS_HINT)
        role = self.roles.get(kept["role"], kept["role"])
        if role == "function_call":
            kept["tool_calls"], kept["content"] = read_function_calls(kept.get("content"), place), ""
        elif (
            "function_call" in kept and "tool_calls" not in kept
        ):  # OpenAI's form before there were several calls
            kept["tool_calls"] = read_function_calls(kept.pop("function_call"), place)
        kept["role"] = _SHAREGPT_ROLES.get(role, role)
        kept["content"] = _read_content(kept.get("content"), place)
        if "tool_calls" in kept:
            kept["tool_calls"] = read_calls(kept["tool_calls"], place)
        marks = {_read_mark(kept.pop(key), key, place) for key in _TRAINED_KEYS if key in kept}
        if len(marks) > 1:
            raise DataError(f"{place} says both that it is trained and that it isn't", "keep one of its keys")
        return kept, marks.pop() if marks else None

    def _with_usual_keys(self, message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
        for usual, own in self.keys.items():
            calls = {self.keys.get(key, key) for key in ("tool_calls", "function_call")}
            if usual in ("role", "content") and own not in message and not calls & set(message):
                listed = ", ".join(f"`{key}`" for key in message)
                raise DataError(
                    f"{place} has no `{own}`, which message_keys names", f"its keys are {listed or 'none'}"
                )
        usual_of = {own: usual for usual, own in self.keys.items()}
        present = {usual_of.get(key, key) for key in message}
        usual_of |= {own: usual for own, usual in _SHAREGPT_KEYS if own in present and usual not in present}
        if not usual_of:
            return message
        # An own key that means a usual one hides a key of that name.
        hidden = {usual for own, usual in usual_of.items() if own in message and own != usual}
        return {
            usual_of.get(key, key): value
            for key, value in message.items()
            if key in usual_of or key not in hidden
        }


def is_answer(messages: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Tell whether a message is trained where nothing else is said: an assistant's that answers something."""
    asks = any(message["role"] not in ("system", "developer") for message in messages[:index])
    return messages[index]["role"] == "assistant" and asks


def _read_content(content: Any, place: str) -> str:
    """Return the text of a message; the texts of a list of parts are joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"`content` of {place} is a {type(content).__name__}, not text", _HINT)
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise DataError(
                f"`content` of {place} has a part that is a {type(part).__name__}, not an object", _HINT
            )
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise DataError(
                f"{place} has a part of type `{kind}`, and only text is trained",
                "leave out rows with images, audio or files, or train their texts alone",
            )
        texts.append(part["text"])
    return "".join(texts)


def _read_mark(value: Any, key: str, place: str) -> bool:
    if value not in (0, 1):
        raise DataError(
            f"`{key}` of {place} is {value!r}: a message is trained or it isn't", f"write {key} 0 or 1"
        )
    return bool(value)
