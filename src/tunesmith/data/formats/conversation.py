"""A row's conversation, in the forms that people have, as the chat templates of transformers expect it.

That is OpenAI's form with objects for the arguments of a call, as https://huggingface.co/docs/transformers/chat_extras
says; ShareGPT's `from` and `value` are turned into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunesmith.data.formats.base import RenderedRow, column_of, is_missing
from tunesmith.errors import DataError

_HINT = 'a conversation is a list such as [{"role": "user", "content": "…"}, …]'
_CALL_HINT = 'a call is such as {"type": "function", "function": {"name": "…", "arguments": {…}}}'
_TEXT_PARTS = ("text", "input_text", "output_text")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
# What a message says about whether it is trained: OpenAI's and Mistral's key, then axolotl's and its kin's.
_TRAINED_KEYS = ("weight", "train", "training", "trainable", "loss")


def read_conversation(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> RenderedRow:
    """Return the row's conversation, which these columns hold one after the other, and its tools.

    `trained` lists the messages to train where that isn't every assistant message behind the first message:
    where the messages say so themselves, or only the last of several columns is to be learned.

    Raises:
        DataError: it is malformed; the message names the row.
    """
    messages: list[dict[str, Any]] = []
    marks: list[bool | None] = []
    for column in columns:
        listed = column_of(row, column, where)
        if not isinstance(listed, list) or not listed:
            raise DataError(f"`{column}` of {where} is not a list of messages", _HINT)
        marks = [False if mark is None else mark for mark in marks]
        for index, message in enumerate(listed):
            place = (
                f"message {index + 1} of {where}"
                if column == "messages"
                else f"`{column}`, message {index + 1} of {where}"
            )
            read, mark = _read_message(message, place)
            messages.append(read)
            marks.append(mark)
    system = row.get("system") if columns == ("conversations",) else None
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        marks.insert(0, None)
    rendered: RenderedRow = {"messages": messages}
    if any(mark is not None for mark in marks):
        rendered["trained"] = [
            index
            for index, mark in enumerate(marks)
            if (is_answer(messages, index) if mark is None else mark)
        ]
    if tools := _read_tools(row.get("tools"), where):
        rendered["tools"] = tools
    return rendered


def is_answer(messages: list[dict[str, Any]], index: int) -> bool:
    """Tell whether a message is trained where the row doesn't say: an assistant's that answers something."""
    return index > 0 and messages[index]["role"] == "assistant"


def _read_message(message: Any, place: str) -> tuple[dict[str, Any], bool | None]:
    """Return the message, and whether it says that it is trained."""
    if not isinstance(message, Mapping):
        raise DataError(f"{place} is a {type(message).__name__}, not an object", _HINT)
    # Arrow gives every message every key of any message, as null: a template may test for their presence.
    kept = {key: value for key, value in message.items() if not is_missing(value)}
    if "role" not in kept and "from" in kept:
        kept = {"role": kept.pop("from"), "content": kept.pop("value", None), **kept}
    if not isinstance(kept.get("role"), str):
        raise DataError(f"{place} has no `role`", _HINT)
    if not {"content", "value", "tool_calls"} & set(message):
        raise DataError(f"{place} has no `content`", _HINT)
    if kept["role"] == "function_call":
        kept["tool_calls"], kept["content"] = _read_function_calls(kept.get("content"), place), ""
    kept["role"] = _SHAREGPT_ROLES.get(kept["role"], kept["role"])
    kept["content"] = _read_content(kept.get("content"), place)
    if "tool_calls" in kept:
        kept["tool_calls"] = _read_calls(kept["tool_calls"], place)
    marks = {_read_mark(kept.pop(key), key, place) for key in _TRAINED_KEYS if key in kept}
    if len(marks) > 1:
        raise DataError(f"{place} says both that it is trained and that it isn't", "keep one of its keys")
    return kept, marks.pop() if marks else None


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


def _read_calls(calls: Any, place: str) -> list[Any]:
    """Return the calls with their arguments as objects, which OpenAI's form holds as JSON text."""
    calls = _parsed(calls, f"`tool_calls` of {place}", _CALL_HINT)
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` of {place} is a {type(calls).__name__}, not a list", _CALL_HINT)
    return [_read_call(call, place) for call in calls]


def _read_call(call: Any, place: str) -> dict[str, Any]:
    call = _parsed(call, f"a call of {place}", _CALL_HINT)
    if not isinstance(call, Mapping):
        raise DataError(f"a call of {place} is a {type(call).__name__}, not an object", _CALL_HINT)
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], place)}
    return _with_arguments(call, place)


def _with_arguments(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    if "arguments" not in function:
        return dict(function)
    arguments = _parsed(function["arguments"] or {}, f"`arguments` of a call of {place}", _CALL_HINT)
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"`arguments` of a call of {place} is a {type(arguments).__name__}, not an object", _CALL_HINT
        )
    return {**function, "arguments": arguments}


def _read_function_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Return ShareGPT's `function_call`, which is a call or a list of them as JSON text, as tool calls."""
    calls = _parsed(
        value, f"the call of {place}", 'a function_call is such as {"name": "…", "arguments": {…}}'
    )
    return [
        {"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])
    ]


def _read_tools(tools: Any, where: str) -> list[Any]:
    hint = "give a list of tools"
    tools = _parsed(tools, f"`tools` of {where}", hint) if tools else []
    if not isinstance(tools, list):
        raise DataError(f"`tools` of {where} is a {type(tools).__name__}", hint)
    return [_read_tool(tool, where) for tool in tools if not is_missing(tool)]


def _read_tool(tool: Any, where: str) -> Any:
    tool = _parsed(tool, f"a tool of {where}", "give each tool as an object")
    if not isinstance(tool, Mapping):
        return tool
    # Nulls that Arrow pads with, as in a message.
    tool = {key: value for key, value in tool.items() if value is not None}
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _with_parameters(tool["function"], where)}
    return _with_parameters(tool, where)


def _with_parameters(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(function.get("parameters"), str):
        return dict(function)
    hint = "give the parameters as a JSON schema"
    return {
        **function,
        "parameters": _parsed(function["parameters"], f"`parameters` of a tool of {where}", hint),
    }


def _parsed(value: Any, what: str, hint: str) -> Any:
    """Return what JSON text holds, and anything else as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not valid JSON: {error}", hint) from error
