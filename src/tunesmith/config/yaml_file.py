"""YAML read strictly and by the rules of YAML 1.2's core schema, and written so that it reads back.

PyYAML follows YAML 1.1, where `5e-5` is text, `no` is false, `1:30` is 90 and a date is an object; editors
and people expect otherwise. Merge keys (`<<`) went with 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ConfigError
from tunesmith.urls import mask

# https://yaml.org/spec/1.2.2/#1032-tag-resolution; with each, the characters it can start with.
_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _CoreLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise ConfigError(
                    f"`{self.name}` line {line}: `{key.value}` is given twice, first on line {lines[key.value]}",
                    "keep one of them",
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(str(self.construct_scalar(node)).replace(".inf", "inf").replace(".nan", "nan"))


class _CoreDumper(yaml.SafeDumper):
    pass


# The dumper keeps 1.1's rules besides, and so quotes what either version would misread.
_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _CORE_SCHEMA:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _CoreDumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _CoreLoader.construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _CoreLoader.construct_float)


def read_yaml_mapping(path: Path) -> dict[Any, Any]:
    """Return what the YAML file holds; a file of comments alone holds nothing.

    Raises:
        ConfigError: the file is absent, unreadable, not UTF-8, not YAML or not a mapping, or has a key twice.
    """
    text = _read_text(path)
    try:
        data = _construct(text, str(path))
    except ConfigError:
        raise
    # PyYAML passes on whatever its constructors raise for a tag that doesn't fit its value (`!!bool 3`).
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"`{path}`{_place_of(error, text)} isn't YAML: {_describe_problem(error)}",
            "settings are written `name: value`; quote a value that holds `: `, ` #`, `{`, `[` or starts with `*`, `&`",
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"`{path}` holds no settings", "settings are written `name: value`, one a line")
    return data


def write_yaml(data: dict[str, Any]) -> str:
    """Return `data` as YAML that `read_yaml_mapping` reads back unchanged."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=110) if data else ""


def _construct(text: str, name: str) -> Any:
    loader = _CoreLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"there is no YAML file `{mask(str(path))}`",
            "a word without `--` before it is read as the YAML file's path",
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"`{mask(str(path))}` can't be read: {reason}", "give the path of a YAML file"
        ) from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"`{path}` line {line} isn't UTF-8: byte 0x{raw[error.start]:02x}", "save the file as UTF-8"
        ) from None


def _place_of(error: Exception, text: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f" line {error.problem_mark.line + 1}"
    if isinstance(error, yaml.reader.ReaderError):
        return f" line {text.count(chr(10), 0, error.position) + 1}"
    return ""


def _describe_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        return ", ".join(part for part in (error.problem, error.context) if part)
    if isinstance(error, yaml.reader.ReaderError):
        return f"character U+{int(error.character):04X} isn't allowed"
    return (
        "it is nested too deeply" if isinstance(error, RecursionError) else "a `!!tag` doesn't fit its value"
    )
