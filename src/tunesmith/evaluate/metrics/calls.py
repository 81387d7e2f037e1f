"""Tool calls in a text, in the forms that models write them, compared by name and arguments.

Known are JSON objects with a name and arguments wherever they stand (Qwen's and Hermes' <tool_call>, Llama 3's with
`parameters`, Mistral's list, plain JSON), a name before its JSON (Mistral's newer form, DeepSeek's, Kimi's), XML
(Qwen3-Coder's, GLM's) and Python (Llama 3.2's and 4's).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

_DECODER = json.JSONDecoder()
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_MARKED = re.compile(r"(?i)tool_?call|python_tag|<call>|function_?call")
# A name right behind a marker, and markers alone between it and its JSON.
_NAMED = re.compile(
    r"[\]>]\s*(?P<name>[A-Za-z_][\w.-]*)(?::\d+)?(?:\s|```json|<[^<>{}]{1,40}>|\[[A-Z_]+\][\w-]*)*(?=\{)"
)
_XML = re.compile(r"<function=(?P<name>[^<>\s]+)>(?P<body>.*?)(?:</function>|\Z)", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=(?P<key>[^<>\s]+)>(?P<value>.*?)</parameter>", re.DOTALL)
_GLM = re.compile(
    r"<tool_call>\s*(?P<name>[\w.-]+)\s*(?P<body>(?:<arg_key>.*?)?)(?:</tool_call>|\Z)", re.DOTALL
)
_GLM_ARGUMENT = re.compile(
    r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL
)
# Alone it is a list of calls, else any code would be one.
_PYTHON = re.compile(
    r".*<\|(?:python_tag|tool_call_start)\|>\s*(?P<marked>\[?[A-Za-z_][\w.]*\(.*\)\]?)"
    r"(?:<\|tool_call_end\|>)?|(?P<listed>\[\s*[A-Za-z_][\w.]*\(.*\)\s*\])",
    re.DOTALL,
)
_BEGIN = re.compile(r"[{\[]")

Call = tuple[str, str]
"""A call's name, and its arguments as canonical JSON."""


def parse_calls(text: str) -> list[Call]:
    """Return the calls that a text holds, sorted: calls side by side have no order."""
    for parse in (_parse_json, _parse_named, _parse_xml, _parse_python):
        if found := list(parse(text)):
            return sorted((name, _canonical(arguments)) for name, arguments in found)
    return []


def match_calls(text: str, reference: str) -> float | None:
    """Return 1 for the reference's calls, all and no others, else 0; None where the reference calls nothing."""
    expected = parse_calls(reference)
    return float(parse_calls(text) == expected) if expected else None


def _parse_json(text: str) -> Iterator[tuple[str, Any]]:
    is_marked = _MARKED.search(text) is not None
    position = 0
    while (begin := _BEGIN.search(text, position)) is not None:
        try:
            value, position = _DECODER.raw_decode(text, begin.start())
        except ValueError:
            position = begin.end()
            continue
        except RecursionError:  # a model that repeats a bracket
            return
        yield from _calls_in(value, is_marked)


def _calls_in(value: Any, is_marked: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from _calls_in(item, is_marked)
        return
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("tool_calls"), list):
        yield from _calls_in(value["tool_calls"], True)
        return
    function = value["function"] if isinstance(value.get("function"), Mapping) else value
    name = function.get("name", value.get("function"))
    key = next((key for key in _ARGUMENTS if key in function), None)
    if not isinstance(name, str) or (
        key is None and not (is_marked and set(function) <= {"name", "id", "type"})
    ):
        return
    arguments = function[key] if key is not None else {}
    if isinstance(arguments, str):  # OpenAI's form
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return
    if isinstance(arguments, Mapping) or (arguments is None and key in ("arguments", "parameters")):
        yield name, arguments or {}


def _parse_named(text: str) -> Iterator[tuple[str, Any]]:
    for match in _NAMED.finditer(text):
        try:
            arguments, _ = _DECODER.raw_decode(text, match.end())
        except (ValueError, RecursionError):
            continue
        yield match["name"].removeprefix("functions."), arguments


def _parse_xml(text: str) -> Iterator[tuple[str, Any]]:
    for form, argument in ((_XML, _XML_ARGUMENT), (_GLM, _GLM_ARGUMENT)):
        for match in form.finditer(text):
            body = match["body"].strip()
            if body.startswith("{"):  # Llama 3.1's
                with suppress(ValueError):
                    yield match["name"], json.loads(body)
                continue
            yield match["name"], {it["key"].strip(): _untyped(it["value"]) for it in argument.finditer(body)}


def _untyped(text: str) -> Any:
    """Return a value that is written without quotes: a number, an object or a truth value where it is one."""
    text = text.strip("\n")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parse_python(text: str) -> Iterator[tuple[str, Any]]:
    match = _PYTHON.fullmatch(text.strip())
    if match is None:
        return
    try:
        tree = ast.parse(match["marked"] or match["listed"], mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        for call in calls:
            if not isinstance(call, ast.Call) or call.args:
                return
            # Llama's own tools are called as brave_search.call(query="…").
            name = ast.unparse(call.func).removesuffix(".call")
            yield name, {str(it.arg): ast.literal_eval(it.value) for it in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return


def _canonical(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, default=str)


def _plain(value: Any) -> Any:
    """Return the value with whole numbers as such: 1.0 is 1."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
