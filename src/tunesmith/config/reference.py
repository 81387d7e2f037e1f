"""The settings described: JSON schema of the YAML file, help for the terminal, reference page for docs/."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from tunesmith.config import HFDatasetConfig, Settings
from tunesmith.config.fields import (
    DATASET_KEY,
    ENVIRONMENT_PREFIX,
    SettingField,
    dataset_field_names,
    read_fields,
    show_value,
)

_GROUP_TITLES = {
    "model": "Model",
    "data": "Data",
    "training": "Training",
    "adapter": "Adapter",
    "evaluation": "Evaluation",
    "memory": "Memory",
    "generation": "Generation",
    "scores": "Scores",
    "export": "Export",
    "server": "Server",
    "cluster": "Cluster",
    "output": "Output",
}
# What the explanations show, of the settings that a model has: one with a value, one switch.
_SHOWN_VALUES = {
    "max_steps": "500",
    "max_samples": "64",
    "max_shard_size": "2GB",
    "max_tokens": "256",
    "port": "8001",
}
_SHOWN_SWITCHES = ("use_wandb", "full_ft", "overwrite", "trust_remote_code")
_FLAG_COLUMN = 36


def json_schema(model: type[Settings]) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the model's YAML file."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": model.__name__,
        "description": _first_line(model),
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property_schema(field) for name, field in read_fields(model).items()},
    }
    for older, name in model.older_names().items():
        schema["properties"][older] = {**schema["properties"][name], "deprecated": True}
    if dataset_field_names(model):
        schema["properties"][DATASET_KEY] = {
            "description": f"{_first_line(HFDatasetConfig)} Each can also be given by itself.",
            **_dataset_schema(),
            "type": ["object", "null"],
        }
    return schema


def format_help(model: type[Settings], usage: str, width: int | None = None) -> str:
    """Return the help of a verb: `usage`, then every flag by group with its type, default and unit.

    `width` is in characters; the terminal's by default.
    """
    width = max(40, width or shutil.get_terminal_size().columns)
    shown, _, _ = _shown_settings(model)
    intro = (
        "Each setting is a flag, a key of the YAML file and an environment variable "
        f"({ENVIRONMENT_PREFIX}{shown.upper()} for --{shown}). Flags win over the environment, the environment "
        "over the YAML file, the file over the defaults. Dashes and underscores both work."
    )
    lines = [usage, "", *textwrap.wrap(intro, width)]
    for title, fields in group_fields(model).items():
        lines += ["", f"{title}:"]
        for field in fields:
            lines += _help_lines(field, width)
    return "\n".join(lines) + "\n"


def format_markdown(model: type[Settings], verb: str) -> str:
    """Return the reference page of a verb's settings."""
    shown, value, switch = _shown_settings(model)
    dashed = shown.replace("_", "-")
    nullable = [field for field in read_fields(model).values() if field.nullable]
    unset = next((field for field in reversed(nullable) if field.unset_word == "auto"), nullable[0])
    lines = [
        f"# Settings of `tunesmith {verb}`",
        "",
        f"Written by `tunesmith schema {verb} --format markdown`.",
        "",
        "Each setting is",
        "",
        f"- a flag: `tunesmith {verb} --{shown} {value}`, or `--{dashed}={value}`,",
        f"- a key of the YAML file: `{shown}: {value}` in `run.yaml`, for `tunesmith {verb} run.yaml`,",
        f"- an environment variable: `{ENVIRONMENT_PREFIX}{shown.upper()}={value}`; an empty one counts as unset.",
        "",
        "Flags win over the environment, the environment over the YAML file, the file over the defaults.",
        "",
        f"A switch is on with `--{switch}`, `--{switch}=true` or `--{switch} true` (or yes, 1), off with",
        f"`--no-{switch}` or `--{switch}=false` (or no, 0). `none` or `auto` unsets a setting that has no value",
        f"by default, as in `--{unset.name} {unset.unset_word}`.",
        "",
        "In a path, `$NAME` and `${NAME}` are the environment's (of what `submit` and `render` send, the job's), and `$$`",
        "is a dollar; one that isn't set is refused. A path that is there as it is written means itself.",
    ]
    if dataset_field_names(model):
        names = ", ".join(f"`{name}`" for name in read_fields(HFDatasetConfig))
        lines += [
            "",
            f"{names} can also stand under `{DATASET_KEY}:` in the YAML file, and as flags with the prefix `--hfdc_`.",
        ]
    lines += [
        "",
        f"`tunesmith schema {verb}` prints the JSON schema of the YAML file, which editors can check.",
    ]
    for title, fields in group_fields(model).items():
        lines += ["", f"## {title}", "", "| Setting | Takes | Default | |", "| --- | --- | --- | --- |"]
        lines += [_markdown_row(field) for field in fields]
    return "\n".join(lines) + "\n"


def group_fields(model: type[Settings]) -> dict[str, list[SettingField]]:
    """Return the model's settings by the title of their group, in the order to show them."""
    fields = list(read_fields(model).values())
    order = [*_GROUP_TITLES, *(field.group for field in fields)]
    groups: dict[str, list[SettingField]] = {}
    for field in sorted(fields, key=lambda field: order.index(field.group)):
        groups.setdefault(_GROUP_TITLES.get(field.group, field.group.capitalize()), []).append(field)
    return groups


def _shown_settings(model: type[Settings]) -> tuple[str, str, str]:
    """Return a setting of the model, a value for it, and a switch, to explain all of them by."""
    fields = read_fields(model)
    shown = next((name for name in _SHOWN_VALUES if name in fields), next(iter(fields)))
    switch = next((name for name in _SHOWN_SWITCHES if name in fields), shown)
    return shown, _SHOWN_VALUES.get(shown, "VALUE"), switch


def _dataset_schema() -> dict[str, Any]:
    fields = read_fields(HFDatasetConfig).items()
    properties = {name: _property_schema(field) for name, field in fields}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property_schema(field: SettingField) -> dict[str, Any]:
    branches: list[dict[str, Any]] = [field.value_schema]
    if field.kind == "datasets":
        branches = [
            {**field.value_schema, "items": _dataset_schema()},
            {"type": "string", "pattern": r"^\s*\["},
        ]
    if field.kind in ("names", "mapping"):
        branches.append({"type": "string"})
    if field.nullable:
        branches.append({"type": "null"})
        if field.kind in ("bool", "int", "float", "datasets"):
            branches.append({"enum": ["auto", "none"]})
    schema: dict[str, Any] = {"description": field.help}
    schema.update({"anyOf": branches} if len(branches) > 1 else branches[0])
    # What follows another setting is no constant, and an editor would insert it as one.
    return schema if field.default_follows else {**schema, "default": field.default}


def _help_lines(field: SettingField, width: int) -> list[str]:
    placeholders = {
        "int": "INT",
        "float": "NUMBER",
        "path": "PATH",
        "names": "NAMES",
        "mapping": "MAPPING",
        "datasets": "JSON",
    }
    if field.kind == "bool" and field.name.startswith("no_"):
        flag = f"  --{field.name}"
    elif field.kind == "bool":
        flag = f"  --[no-]{field.name}"
    else:
        flag = f"  --{field.name} {placeholders.get(field.kind, 'TEXT')}"
    choices = f" One of {', '.join(field.choices)}." if field.choices else ""
    text = f"{field.help}{choices} [{_show_default(field)}]"
    column = _FLAG_COLUMN if width >= 2 * _FLAG_COLUMN else 6
    wrapped = textwrap.wrap(text, width - column, break_long_words=False, break_on_hyphens=False)
    lines = [" " * column + line for line in wrapped]
    if len(flag) + 2 <= column:
        return [flag.ljust(column) + wrapped[0], *lines[1:]]
    return [flag, *lines]


def _markdown_row(field: SettingField) -> str:
    default = _show_default(field)
    cells = [f"`{field.name}`", field.describe_allowed(), f"`{default}`", field.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _show_default(field: SettingField) -> str:
    if field.default is None:
        return field.unset_word
    return show_value(field.default, limit=200)


def _first_line(model: type[Settings]) -> str:
    return ((model.__doc__ or "").strip() or model.__name__).splitlines()[0]
