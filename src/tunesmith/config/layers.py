"""Settings from everywhere they can be given, checked once, and written down.

Precedence: defaults < YAML file < environment (`TUNESMITH_<SETTING>`) < flags. Works for any `Settings` model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tunesmith.config import HFDatasetConfig, Settings
from tunesmith.config.data import OF_ALL
from tunesmith.config.declare import AS_WRITTEN, RECORDED, parse_json, unescape
from tunesmith.config.fields import (
    DATASET_KEY,
    DATASETS,
    ENVIRONMENT_PREFIX,
    SettingField,
    dataset_field_names,
    nearest_name,
    read_fields,
    show_value,
)
from tunesmith.config.flags import find_field
from tunesmith.config.yaml_file import read_yaml_mapping, write_yaml
from tunesmith.errors import ConfigError

Model = TypeVar("Model", bound=Settings)


@dataclass(frozen=True)
class _Given:
    """A value and where it came from, as the user would write it: `--max_steps`, `run.yaml: max_steps`."""

    value: Any
    origin: str


@dataclass(frozen=True)
class _Problem:
    text: str
    hint: str | None


def load_settings(
    model: type[Model],
    yaml_path: Path | None,
    flags: Mapping[str, str],
    environ: Mapping[str, str],
    section: str | None = None,
    as_written: bool = False,
) -> Model:
    """Return the settings; its `model_fields_set` is exactly what the user gave.

    `flags` holds texts by setting, as `parse_flags` returns them; of `environ` the variables that start
    with `TUNESMITH_` count, unless they are empty. Of a YAML file with a mapping `section`, that alone counts.
    Variables in paths are the process's own, unless they are to stay `as_written`.

    Raises:
        ConfigError: anything is unknown, given twice in one place, malformed or out of range. One error names
            every bad value, where it came from and what is allowed.
    """
    given: dict[str, _Given] = {}
    if yaml_path is not None:
        given.update(_read_yaml(model, yaml_path, section))
    given.update(_read_environ(model, environ))
    fields = read_fields(model)
    given.update({name: _from_words(fields[name], text, f"--{name}") for name, text in flags.items()})
    given = _spread_single_dataset(model, given)
    values = {name: _plain_value(fields[name], item.value) for name, item in given.items()}
    try:
        return model.model_validate(values, context=AS_WRITTEN if as_written else None)
    except ValidationError as error:
        raise _explain(model, given, error.errors(include_url=False)) from None


def dump_settings(config: Settings) -> dict[str, Any]:
    """Return every setting by name, as JSON can hold it."""
    return config.model_dump(mode="json")


def settings_from_dump(model: type[Model], dump: Mapping[str, Any], given: Iterable[str]) -> Model:
    """Read what `dump_settings` returned; `given` names the settings that the user chose.

    Raises:
        ConfigError: the dump holds settings that this version doesn't know, or refuses.
    """
    older = model.older_names()
    dump = {older.get(name, name): value for name, value in dump.items()}
    given = {older.get(name, name) for name in given}
    unknown = sorted((set(dump) | given) - set(model.model_fields))
    if unknown:
        raise ConfigError(
            f"recorded settings are unknown here: {', '.join(f'`{name}`' for name in unknown)}",
            "they were written by another version of tunesmith; use that version",
        )
    try:
        config = model.model_validate(dict(dump), context=RECORDED)
    except ValidationError as error:
        recorded = {name: _Given(value, f"recorded {name}") for name, value in dump.items()}
        raise _explain(model, recorded, error.errors(include_url=False)) from None
    return model.model_construct(_fields_set=set(given), **dict(config))


def dump_yaml(config: Settings) -> str:
    """Return the settings that the user gave as a YAML file that `load_settings` reads back."""
    return write_yaml(config.model_dump(mode="json", exclude_unset=True))


def _read_yaml(model: type[Settings], path: Path, section: str | None) -> dict[str, _Given]:
    data, where = read_yaml_mapping(path), str(path)
    if section is not None and isinstance(data.get(section), dict):
        data, where = data[section], f"{path}: {section}"
    flat = _undash_keys(data, where)
    grouped_names = dataset_field_names(model)
    group = flat.pop(DATASET_KEY, None) if grouped_names else None
    if group is not None and not isinstance(group, dict):
        raise ConfigError(
            f"`{where}: {DATASET_KEY}` is `{show_value(group)}`; it must be a mapping",
            f"write `{DATASET_KEY}:` and under it, indented, `dataset_name: …`",
        )
    grouped = _undash_keys(group or {}, f"{where}: {DATASET_KEY}")
    older = model.older_names()
    known = [*read_fields(model), *older, *([DATASET_KEY] if grouped_names else [])]
    problems = [_unknown_key(where, key, known) for key in flat if key not in known]
    for key in grouped:
        if key not in grouped_names:
            problems.append(_unknown_key(f"{where}: {DATASET_KEY}", key, sorted(grouped_names)))
        elif key in flat:
            text = f"`{where}` gives `{key}` both by itself and under `{DATASET_KEY}`"
            problems.append(_Problem(text, "keep one of them"))
    for name in older.keys() & flat.keys():
        if older[name] in flat:
            text = f"`{where}` gives `{older[name]}` and `{name}`, its older name"
            problems.append(_Problem(text, "keep one of them"))
    if problems:
        raise _one_error(problems)
    given = {older.get(name, name): _Given(value, f"{where}: {name}") for name, value in flat.items()}
    given.update({name: _Given(value, f"{where}: {DATASET_KEY}.{name}") for name, value in grouped.items()})
    return given


def _spread_single_dataset(model: type[Settings], given: dict[str, _Given]) -> dict[str, _Given]:
    """Return the settings with a list of one data set as that data set's, each with where it came from.

    Data sets that are given in both ways are left for the model to refuse.
    """
    listed = given.get(DATASETS)
    elements = parse_json(listed.value) if listed is not None else None
    if listed is None or not isinstance(elements, list) or not all(isinstance(it, dict) for it in elements):
        return given
    names = dataset_field_names(model)
    elements = [_undash_keys(it, f"{listed.origin}.{i}") for i, it in enumerate(elements)]
    problems = [
        _unknown_key(f"{listed.origin}.{i}", key, names)
        for i, element in enumerate(elements)
        for key in element
        if key not in names
    ]
    if problems:
        raise _one_error(problems)
    if len(elements) != 1 or names & given.keys() - OF_ALL or elements[0].keys() & given.keys():
        fields = read_fields(model)
        plain = [{name: _plain_value(fields[name], value) for name, value in it.items()} for it in elements]
        return {**given, DATASETS: _Given(plain, listed.origin)}
    spread = {name: _Given(value, f"{listed.origin}.0.{name}") for name, value in elements[0].items()}
    return {name: item for name, item in given.items() if name != DATASETS} | spread


def _undash_keys(data: dict[Any, Any], where: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in names:
            raise ConfigError(f"`{where}` gives `{name}` twice, with a dash and without", "keep one of them")
        names[name] = value
    return names


def _read_environ(model: type[Settings], environ: Mapping[str, str]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    problems = []
    others = _names_of_all_settings()
    for variable in sorted(environ):
        # Unset variables reach containers and CI jobs as empty ones.
        if not variable.upper().startswith(ENVIRONMENT_PREFIX) or environ[variable] == "":
            continue
        name = variable[len(ENVIRONMENT_PREFIX) :].lower()
        field = find_field(model, name)
        if field is None:
            # Verbs share the prefix, so only what looks like a misspelling of this verb's setting counts.
            near = None if name in others else nearest_name(name, read_fields(model), cutoff=0.8)
            if near is not None:
                hint = f"did you mean `{ENVIRONMENT_PREFIX}{near.upper()}`?"
                problems.append(_Problem(f"unknown environment variable `{variable}`", hint))
        elif field.name in given:
            text = f"`{given[field.name].origin}` and `{variable}` give the same setting"
            problems.append(_Problem(text, "unset one of them"))
        else:
            given[field.name] = _from_words(field, environ[variable], variable)
    if problems:
        raise _one_error(problems)
    return given


def _from_words(field: SettingField, text: str, origin: str) -> _Given:
    return _Given(unescape(text) if field.escapes else text, origin)


def _names_of_all_settings() -> set[str]:
    models: list[type[Settings]] = [Settings]
    names: set[str] = set()
    while models:
        model = models.pop()
        names.update(model.model_fields, model.older_names())
        models.extend(model.__subclasses__())
    return names


def _plain_value(field: SettingField, value: Any) -> Any:
    # pydantic takes true for the number 1; as text it is refused like any other word.
    return str(value).lower() if isinstance(value, bool) and field.kind in ("int", "float") else value


def _unknown_key(where: str, key: str, known: Iterable[str]) -> _Problem:
    near = nearest_name(key, known)
    return _Problem(f"`{where}`: unknown setting `{key}`", f"did you mean `{near}`?" if near else None)


def _explain(
    model: type[Settings], given: Mapping[str, _Given], errors: Iterable[ErrorDetails]
) -> ConfigError:
    """Return one error for all that pydantic found, in the user's terms."""
    problems: dict[str, _Problem] = {}
    for error in errors:
        if error["type"] == "default_factory_not_called":
            # A default that follows another setting, which is itself among the errors.
            continue
        if error["loc"]:
            field = read_fields(model)[str(error["loc"][0])]
            problems.setdefault(field.name, _explain_field(field, given[field.name], error))
        else:
            text = _reason_of(error) or error["msg"]
            origins = [f"`{item.origin}`" for name, item in given.items() if re.search(rf"\b{name}\b", text)]
            text += f" (given by {', '.join(origins)})" if origins else ""
            problems.setdefault(text, _Problem(text, None))
    return _one_error(list(problems.values()))


def _explain_field(field: SettingField, item: _Given, error: ErrorDetails) -> _Problem:
    path = [str(part) for part in error["loc"][1:] if part != "[key]"]
    value = error["input"] if path else item.value
    where = f"`{'.'.join([item.origin, *path])}`"
    if field.name == DATASETS and len(path) > 1:
        # Of one of the data sets: what is allowed is that setting's.
        field, path = read_fields(HFDatasetConfig)[path[1]], path[2:]
    shown = "empty" if value is None or value == "" else f"`{show_value(value)}`"
    reason = _reason_of(error)
    if reason:
        return _Problem(f"{where} is {shown}: {reason}", f"`{field.name}`: {field.help}")
    near = nearest_name(str(value), field.choices)
    if near:
        hint = f"did you mean `{near}`?"
    elif isinstance(value, bool | int | float) and field.kind in ("text", "path", "names", "mapping"):
        hint = f"put it in quotes to make it text: '{show_value(value)}'"
    else:
        hint = f"`{field.name}`: {field.help}"
    allowed = "text" if path else field.describe_allowed()
    if field.name == DATASETS and path:
        allowed = "a mapping of a data set's settings"
    return _Problem(f"{where} is {shown}; it must be {allowed}", hint)


def _reason_of(error: ErrorDetails) -> str | None:
    """Return what a check of our own said, or None if the error is one of pydantic's."""
    cause = error.get("ctx", {}).get("error")
    return str(cause) if error["type"] == "value_error" and cause is not None else None


def _one_error(problems: list[_Problem]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(problems[0].text, problems[0].hint or "`--help` lists the settings")
    lines = [f"{len(problems)} settings can't be used:"]
    for problem in problems:
        near = problem.hint if problem.hint and problem.hint.startswith("did you mean") else None
        lines.append(f"  {problem.text}" + (f" ({near})" if near else ""))
    return ConfigError("\n".join(lines), "`--help` lists the settings and what they take")
