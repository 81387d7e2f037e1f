"""What the chart's framework scripts do: the verbs of `tunesmith`, with `$HOME` as the home of their runs."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.chart.converted import Converter, write_converted
from tunesmith.cli import main
from tunesmith.config import ConvertConfig, EvaluateConfig, HFDatasetConfig, Settings, TrainConfig
from tunesmith.config.fields import dataset_field_names
from tunesmith.config.flags import parse_flags
from tunesmith.config.layers import load_settings
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.logs import configure_logging
from tunesmith.remote.copies import copies_in

_DATASET = "hf_dataset_config"
_CONVERTER = "custom_converter"


def run_fine_tune(make_defaults: Callable[[], Any], converter: Converter | None = None) -> int:
    """Train as `tunesmith train` does, with what `fine_tune_words` adds, and return the exit code."""
    return _run("train", lambda words: fine_tune_words(make_defaults, converter, words))


def run_evaluate() -> int:
    """Evaluate as `tunesmith evaluate` does, with runs looked for in `$HOME`, and return the exit code."""
    return _run("evaluate", lambda words: _complete(EvaluateConfig, words, {}))


def run_convert() -> int:
    """Convert as `tunesmith convert` does, with runs looked for in `$HOME`, and return the exit code."""
    return _run("convert", lambda words: _complete(ConvertConfig, words, {}))


def _run(verb: str, complete: Callable[[list[str]], list[str]]) -> int:
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        return main([verb, *words])
    try:
        words = complete(words)
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return main([verb, *words])


def fine_tune_words(
    make_defaults: Callable[[], Any], converter: Converter | None, words: Sequence[str]
) -> list[str]:
    """Return the words of `tunesmith train`: those given, and what a script's own defaults add.

    `make_defaults` returns a dataclass whose fields are settings, and `hf_dataset_config` with those of the
    data set; they count where neither flags nor environment nor YAML file say otherwise. `converter` makes a
    row of the data set into `{"input", "output"}` or `{"messages"}`, in place of the templates; the data set's
    `custom_converter`, where it has one, comes first. The converted rows are written below the home.

    Raises:
        ConfigError: a setting is unknown or can't be used, wherever it was given.
        DataError: the data set can't be converted.
    """
    own, own_converter = _read_defaults(make_defaults)
    completed = _complete(TrainConfig, words, own)
    convert = own_converter or converter
    return completed if convert is None else [*completed, *_convert_data(completed, convert)]


def _complete(model: type[Settings], words: Sequence[str], defaults: Mapping[str, str]) -> list[str]:
    """Return the words of a verb with those of `defaults`, and a home, that they don't say yet."""
    flags = parse_flags(model, words, "checkpoints_dir" if "checkpoints_dir" in model.model_fields else None)
    given = load_settings(model, flags.yaml_path, flags.values, os.environ).model_fields_set
    if "datasets" in given:  # they take the place of a script's own data set
        defaults = {name: text for name, text in defaults.items() if name not in dataset_field_names(model)}
    missing = {**defaults, "home": defaults.get("home", str(Path.home()))}
    return [*words, *(f"--{name}={text}" for name, text in missing.items() if name not in given)]


def _read_defaults(make_defaults: Callable[[], Any]) -> tuple[dict[str, str], Converter | None]:
    """Return the settings, as flags hold them, in which a script's defaults differ from the package's."""
    try:
        defaults = make_defaults()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(
            f"the script's default of `{where}` can't be used: {problem['msg']}",
            f"mend it in the Config of `{sys.argv[0]}`",
        ) from None
    values = _fields_of(defaults)
    dataset = _fields_of(values.pop(_DATASET, HFDatasetConfig()))
    converter = dataset.pop(_CONVERTER, None)
    values.update(dataset)
    packaged = {**TrainConfig().model_dump(mode="json"), "home": None}
    unknown = [name for name, value in values.items() if name not in packaged and value not in (None, {}, [])]
    if unknown:
        raise ConfigError(
            f"the script's Config holds `{unknown[0]}`, which is no setting",
            "`tunesmith train --help` lists the settings",
        )
    changed = {name: value for name, value in values.items() if value != packaged.get(name)}
    return {name: _as_flag(value) for name, value in changed.items()}, converter


def _fields_of(values: Any) -> dict[str, Any]:
    """Return what was set in a group of settings, the package's or a dataclass of the user's own."""
    if isinstance(values, Settings):
        return values.model_dump(mode="json", exclude_unset=True)
    return {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}


def _as_flag(value: Any) -> str:
    if isinstance(value, bool | dict | list):
        return json.dumps(value)
    return "none" if value is None else str(value)


def _convert_data(words: Sequence[str], convert: Converter) -> list[str]:
    """Convert the data set that the words of `train` mean; return the flags that name the converted one."""
    configure_logging()
    flags = parse_flags(TrainConfig, words)
    config = load_settings(TrainConfig, flags.yaml_path, flags.values, os.environ)
    with copies_in(config.home):
        path, has_templates = write_converted(config, convert)
    settings = {
        "dataset_name": str(path),
        "dataset_config": "none",
        "dataset_revision": "none",
        "split": "train",
    }
    if has_templates:
        settings |= {"input_template": "{input}", "output_template": "{output}", "field_mapping": "{}"}
    return [f"--{name}={text}" for name, text in settings.items()]
