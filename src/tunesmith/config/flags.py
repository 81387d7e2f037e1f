"""The command line of a `Settings` model: words → an optional YAML file and one text per setting."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.config import Settings
from tunesmith.config.fields import SettingField, dataset_field_names, nearest_name, read_fields
from tunesmith.errors import ConfigError
from tunesmith.urls import mask

DATASET_PREFIX = "hfdc_"
_BOOLEAN_WORDS = frozenset({"true", "false", "yes", "no", "1", "0"})


@dataclass(frozen=True)
class ParsedFlags:
    """What a command line says: its YAML file, and the text given for each setting by name."""

    yaml_path: Path | None
    values: Mapping[str, str]


def parse_flags(
    model: type[Settings],
    argv: Sequence[str],
    word_setting: str | None = None,
    more_setting: str | None = None,
) -> ParsedFlags:
    """Read the words after the verb; values stay text until `load_settings` checks them.

    A flag's next word is its value, except that a switch (a boolean) takes it only if it is one of
    true, false, yes, no, 1, 0, so that `--use_wandb run.yaml` leaves `run.yaml` as the YAML file.
    A flag given twice counts as given last. A plain word that isn't called `….yaml` is the value of
    `word_setting`, where there is one; those after it are listed in `more_setting`, where there is one.

    Raises:
        ConfigError: a flag is unknown or lacks its value, or there are two YAML files or plain words.
    """
    words = list(argv)
    yaml_path: Path | None = None
    values: dict[str, str] = {}
    more: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            name, value = _read_flag(model, word, words)
            values[name] = value
        elif word_setting is not None and not word.endswith((".yaml", ".yml")):
            if word_setting in values and more_setting is not None:
                more.append(word)
                continue
            if word_setting in values:
                raise ConfigError(
                    f"`{word_setting}` is given twice: `{values[word_setting]}` and `{word}`",
                    "keep one of them",
                )
            values[word_setting] = word
        elif yaml_path is None:
            yaml_path = Path(word)
        else:
            raise ConfigError(
                f"two YAML files are given: `{mask(str(yaml_path))}` and `{mask(word)}`",
                "put all settings in one file, or give some as flags; a word without `--` is the YAML file",
            )
    if more and more_setting in values:
        raise ConfigError(
            f"`{more_setting}` is given twice: `{values[more_setting]}` and `{' '.join(more)}`",
            "keep one of them",
        )
    return ParsedFlags(
        yaml_path, {**values, more_setting: json.dumps(more)} if more and more_setting else values
    )


def find_field(model: type[Settings], name: str) -> SettingField | None:
    """Return the setting that a flag or an environment variable means by `name`, if any.

    Dashes count as underscores; settings of the data set may carry the prefix `hfdc_`. Older names count.
    """
    name = name.replace("-", "_")
    rest = name.removeprefix(DATASET_PREFIX)
    if rest in dataset_field_names(model):
        name = rest
    return read_fields(model).get(model.older_names().get(name, name))


def _read_flag(model: type[Settings], word: str, words: list[str]) -> tuple[str, str]:
    """Return the name and value of the flag `word`; takes its value from `words` if it must."""
    spelling, equals, value = word.partition("=")
    field = find_field(model, spelling[2:]) if spelling.startswith("--") else None
    if field is None and spelling.startswith(("--no-", "--no_")):
        return _negated_field(model, spelling, equals).name, "false"
    if field is None:
        raise _unknown_flag(model, spelling)
    if equals:
        return field.name, value
    if field.kind == "bool":
        taken = _BOOLEAN_WORDS | {field.unset_word} if field.nullable else _BOOLEAN_WORDS
        return field.name, words.pop(0) if words and words[0].lower() in taken else "true"
    if not words or words[0].startswith("-"):
        following = f", and is followed by `{words[0]}`" if words else ""
        hint = f"it takes {field.describe_allowed()}"
        if words and find_field(model, words[0].partition("=")[0].lstrip("-")) is None:
            hint += f"; a value that starts with a dash is written `{spelling}={words[0]}`"
        raise ConfigError(f"`{spelling}` has no value{following}", hint)
    return field.name, words.pop(0)


def _negated_field(model: type[Settings], spelling: str, equals: str) -> SettingField:
    field = find_field(model, spelling[5:])
    if field is None:
        raise _unknown_flag(model, spelling)
    if field.kind != "bool":
        raise ConfigError(
            f"`{spelling}` can't be: `{field.name}` isn't true or false",
            f"`--{field.name}` takes {field.describe_allowed()}",
        )
    if equals:
        raise ConfigError(
            f"`{spelling}` takes no value", f"write `--{field.name}=true` or `--{field.name}=false`"
        )
    return field


def _unknown_flag(model: type[Settings], spelling: str) -> ConfigError:
    fields = read_fields(model)
    name = spelling.lstrip("-").replace("-", "_")
    near = nearest_name(name.removeprefix(DATASET_PREFIX), fields)
    if name.startswith("no_"):
        switches = [field.name for field in fields.values() if field.kind == "bool"]
        near_switch = nearest_name(name.removeprefix("no_"), switches)
        near = f"no-{near_switch}" if near_switch else near
    hint = f"did you mean `--{near}`?" if near else "`--help` lists the flags"
    return ConfigError(f"unknown flag `{spelling}`", hint)
