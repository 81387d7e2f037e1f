"""What each setting takes, read from its declaration in `config.py`.

Flags, messages, the JSON schema, the help and the reference page all speak of a setting through this.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from tunesmith.config import HFDatasetConfig, Settings
from tunesmith.config.adapter import STARTS, STARTS_PATTERN
from tunesmith.config.data import TURNS, TURNS_PATTERN
from tunesmith.config.declare import NAME_PATTERN
from tunesmith.urls import mask

ENVIRONMENT_PREFIX = "TUNESMITH_"
DATASET_KEY = "hf_dataset_config"
DATASETS = "datasets"

Kind = Literal["bool", "int", "float", "text", "path", "choice", "names", "mapping", "datasets"]

_CHECKS = (
    "type",
    "enum",
    "format",
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "exclusiveMaximum",
    "minLength",
    "minItems",
    "pattern",
    "items",
    "additionalProperties",
)


@dataclass(frozen=True)
class SettingField:
    """One setting as people meet it: in YAML, in the environment and as a flag.

    `value_schema` is the JSON schema of a value that is set. A `nullable` setting can also be unset:
    `unset_word` is what a person writes then. `default_follows` tells that the default depends on
    other settings; `default` is the one that goes with their defaults. `escapes`: flags and variables write a
    newline as backslash-n.
    """

    name: str
    kind: Kind
    value_schema: dict[str, Any]
    nullable: bool
    default: Any
    default_follows: bool
    group: str
    help: str
    escapes: bool = False

    @property
    def unset_word(self) -> str:
        """`auto` where the program then decides a switch or a count, else `none`."""
        return "auto" if self.kind in ("bool", "int") else "none"

    @property
    def choices(self) -> list[str]:
        return list(self.value_schema.get("enum", []))

    def describe_allowed(self) -> str:
        """Return what the setting takes, in plain words that fit after "it must be"."""
        words = _describe_value(self)
        return f"{words}, or {self.unset_word}" if self.nullable else words


@cache
def read_fields(model: type[Settings]) -> dict[str, SettingField]:
    """Return the settings of `model` by name, in the order of their declaration."""
    schemas = model.model_json_schema()["properties"]
    defaults = model().model_dump(mode="json")
    fields = {}
    for name, info in model.model_fields.items():
        schema = schemas[name]
        branches = schema.get("anyOf", [schema])
        value = next(branch for branch in branches if branch.get("type") != "null")
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        kind = _kind_of(value)
        # What a data set holds is told by the fields of its own.
        checks = [key for key in _CHECKS if key in value and (kind, key) != ("datasets", "items")]
        fields[name] = SettingField(
            name=name,
            kind=kind,
            value_schema={key: value[key] for key in checks},
            nullable={"type": "null"} in branches,
            default=defaults[name],
            default_follows=bool(info.default_factory_takes_validated_data),
            group=str(extra["group"]),
            help=info.description or "",
            escapes=bool(extra.get("escapes")),
        )
    return fields


def dataset_field_names(model: type[Settings]) -> frozenset[str]:
    """Return the settings of `model` that YAML may group under `hf_dataset_config`."""
    return frozenset(HFDatasetConfig.model_fields) if issubclass(model, HFDatasetConfig) else frozenset()


def nearest_name(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of `names` that was most likely meant by `name`, or None if none is near.

    `cutoff` is the least similarity, from 0 to 1. Beyond misspellings, a part of a name counts
    (`epochs` for `num_train_epochs`) unless `cutoff` asks for close ones.
    """
    known = list(names)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=max(cutoff, 0.8))
    if close or cutoff >= 0.8:
        return close[0] if close else None
    containing = [other for other in known if len(name) >= 4 and name.lower() in other]
    similar = difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return next(iter(containing + similar), None)


def show_value(value: Any, limit: int = 80) -> str:
    """Return `value` on one line of at most `limit` characters, for a message or a table.

    What opens something in an address isn't shown.
    """
    if isinstance(value, str):
        text = mask(value).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = mask(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _kind_of(schema: dict[str, Any]) -> Kind:
    if "enum" in schema:
        return "choice"
    if schema.get("format") == "path":
        return "path"
    if "$ref" in schema.get("items", {}):
        return "datasets"
    kinds: dict[str, Kind] = {
        "boolean": "bool",
        "integer": "int",
        "number": "float",
        "string": "text",
        "array": "names",
        "object": "mapping",
    }
    return kinds[schema["type"]]


def _describe_value(field: SettingField) -> str:
    if field.kind == "choice":
        return "one of " + ", ".join(field.choices)
    if field.kind in ("int", "float"):
        bounds = _describe_bounds(field.value_schema)
        return ("a whole number" if field.kind == "int" else "a number") + (f" {bounds}" if bounds else "")
    if field.value_schema.get("pattern") == TURNS_PATTERN:
        return TURNS
    if field.value_schema.get("pattern") == STARTS_PATTERN:
        return STARTS
    if field.value_schema.get("pattern") == NAME_PATTERN:
        return "a name of letters, digits and _ . -"
    if "pattern" in field.value_schema:
        return "a plain folder name, without a slash or a dot in front"
    if field.kind == "text":
        return "text that isn't empty" if field.value_schema.get("minLength") else "text"
    words: dict[Kind, str] = {
        "bool": "true or false",
        "path": "a path",
        "names": "names, as a,b or [a, b]",
        "mapping": "a mapping, as name=column,… or {name: column}",
        "datasets": "a list of mappings, as [{dataset_name: rows.jsonl}, …] or JSON text",
    }
    return words[field.kind]


def _describe_bounds(schema: dict[str, Any]) -> str:
    words = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return " and ".join(f"{word} {show_value(schema[key])}" for key, word in words.items() if key in schema)
