"""Tool calls and the tools they call, in the forms that people have, as chat templates expect them: objects, not JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.formats.base import is_missing
from tunesmith.data.json_text import ROW_DECODER
from tunesmith.errors import DataError

# What others call the arguments of a call: Gemini and ShareGPT, Anthropic.
_ARGUMENTS = ("parameters", "args", "input")
_CALL_HINT = 'a call is such as {"type": "function", "function": {"name": "…", "arguments": {…}}}'


def read_calls(calls: Any, place: str) -> list[Any]:
    """Return the calls with their arguments as objects, which OpenAI's form holds as JSON text."""
    calls = parse_text(calls, f"`tool_calls` of {place}", _CALL_HINT)
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` of {place} is a {type(calls).__name__}, not a list", _CALL_HINT)
    return [_read_call(call, place) for call in calls]


def _read_call(call: Any, place: str) -> dict[str, Any]:
    call = parse_text(call, f"a call of {place}", _CALL_HINT)
    if isinstance(call, Mapping) and "function" in call and not isinstance(call["function"], Mapping):
        raise DataError(
            f"the `function` of a call of {place} is a {type(call['function']).__name__}, not an object",
            _CALL_HINT,
        )
    if not isinstance(call, Mapping):
        raise DataError(f"a call of {place} is a {type(call).__name__}, not an object", _CALL_HINT)
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], place)}
    return _with_arguments(call, place)


def _with_arguments(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    if not isinstance(function.get("name"), str):
        raise DataError(f"a call of {place} has no `name`", _CALL_HINT)
    if "arguments" not in function:
        other = next((key for key in _ARGUMENTS if key in function), None)
        if other is None:
            return dict(function)
        function = {"arguments" if key == other else key: value for key, value in function.items()}
    arguments = parse_text(function["arguments"] or {}, f"`arguments` of a call of {place}", _CALL_HINT)
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"`arguments` of a call of {place} is a {type(arguments).__name__}, not an object", _CALL_HINT
        )
    return {**function, "arguments": arguments}


def read_function_calls(value: Any, place: str) -> list[Mapping[str, Any]]:
    """Return ShareGPT's `function_call`, which is a call or a list of them as JSON text, as tool calls."""
    calls = parse_text(
        value, f"the call of {place}", 'a function_call is such as {"name": "…", "arguments": {…}}'
    )
    listed = calls if isinstance(calls, list) else [calls]
    # Some wrap it as OpenAI does.
    return [
        call
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)
        else {"type": "function", "function": call}
        for call in listed
    ]


def read_tools(tools: Any, where: str) -> list[Any]:
    hint = "give a list of tools"
    tools = parse_text(tools, f"`tools` of {where}", hint) if tools else []
    if not isinstance(tools, list):
        raise DataError(f"`tools` of {where} is a {type(tools).__name__}", hint)
    return [_read_tool(tool, where) for tool in tools if not is_missing(tool)]


def _read_tool(tool: Any, where: str) -> Any:
    tool = parse_text(tool, f"a tool of {where}", "give each tool as an object")
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
        "parameters": parse_text(function["parameters"], f"`parameters` of a tool of {where}", hint),
    }


def parse_text(value: Any, what: str, hint: str) -> Any:
    """Return what JSON text holds, and anything else as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return ROW_DECODER.decode(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not valid JSON: {error}", hint) from error
