"""Which run the settings mean, whether they may go on with it, and what it records of itself."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import tunesmith
from tunesmith.config import TrainConfig
from tunesmith.config.layers import dump_settings, settings_from_dump
from tunesmith.errors import ConfigError, RunError
from tunesmith.paths import count_bytes, exists, expand_user, find_long_name, longest_name
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import find_ending
from tunesmith.urls import is_url

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainConfig)

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "tokenizers", "ray", "numpy")

# By token; runs that record none draw from torch's generator alone, seeded for each microbatch.
_DROPOUT_VERSION = 2

# What the names of the first runs were made from; never to be changed.
_FIRST_SETTINGS = frozenset(
    [
        "attn_implementation",
        "dataset_config",
        "dataset_name",
        "dataset_revision",
        "dtype",
        "early_stopping_patience",
        "early_stopping_threshold",
        "eval_steps",
        "field_mapping",
        "full_ft",
        "gradient_accumulation_steps",
        "hf_model_id",
        "input_template",
        "learning_rate",
        "lora_alpha",
        "lora_dropout",
        "lora_rank",
        "lora_target_modules",
        "lr_scheduler_type",
        "max_eval_samples",
        "max_grad_norm",
        "max_seq_length",
        "min_learning_rate",
        "model_path",
        "model_revision",
        "num_train_epochs",
        "output_template",
        "packing",
        "per_device_train_batch_size",
        "seed",
        "split",
        "train_split_ratio",
        "trust_remote_code",
        "use_rslora",
        "val_test_split_ratio",
        "warmup_ratio",
        "weight_decay",
    ]
)


@dataclass(frozen=True)
class ModelRecord:
    """The base model of a run: as it was given, where it lay, and what tells it from another."""

    source: str
    path: str | None
    fingerprint: str


@dataclass(frozen=True)
class AdapterRecord:
    """The adapter that a run goes on from, or on top of: as it was given, and what tells it from another."""

    source: str
    fingerprint: str


@dataclass(frozen=True)
class DataRecord:
    """The data of a run: as they were given, what tells them from others, and where they lie prepared.

    `row_format` is a list where there are several data sets; `shares` tells what an epoch takes of each of them.
    `date` (ISO) is the day that the chat template has written into the texts, None where it writes none.
    `end_tokens` are those that the trained answers end with, the commonest first; None of those who didn't look.
    """

    source: str
    revision: str
    fingerprint: str
    folder: str
    data_dir: str
    row_format: str | list[str]
    rendering_version: int = 1
    date: str | None = None
    shares: list[dict[str, Any]] | None = None
    end_tokens: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `params.json` holds: what isn't told of a single data set or the first rendering is left out."""
        content = asdict(self)
        if self.rendering_version == 1:
            del content["rendering_version"]
        if self.date is None:
            del content["date"]
        if self.shares is None:
            del content["shares"]
        if self.end_tokens is None:
            del content["end_tokens"]
        return content


def recorded_date(params: Mapping[str, Any] | None) -> str:
    """Return the day (ISO) on which a run's conversations are held: the recorded one, or else today."""
    recorded = params["data"].get("date") if params else None
    return recorded or datetime.date.today().isoformat()


def drops_by_token(params: Mapping[str, Any]) -> bool:
    """Return whether a run's dropout follows from each token's row and place: that of older ones doesn't."""
    return bool(params.get("dropout_version", 1) == _DROPOUT_VERSION)


def locate_run(config: TrainConfig) -> RunDir:
    """Return the run that these settings mean; touches nothing on disk."""
    run_name = config.run_name or default_run_name(config)
    home = config.home if config.home is not None else Path("runs") / run_name
    run = RunDir(expand_user(home).absolute(), config.results_dir, config.model.name, run_name)
    _check_names(run, config)
    return run


def _check_names(run: RunDir, config: TrainConfig) -> None:
    """Refuse names that the disk of the run's home has no room for."""
    longest = longest_name(run.home)
    name = find_long_name(run.path, longest)
    if name is None:
        return
    size = f"{count_bytes(name)} bytes, and the disk of `{run.home}` takes {longest}"
    if name == run.model_name:
        raise ConfigError(
            f"the folder of the model's results would be `{name}`: {size}",
            "name the model otherwise: --hf_model_id NAME beside --model_path",
        )
    if name == run.path.name:
        most = longest - (count_bytes(name) - count_bytes(run.run_name))
        what = "`run_name` makes" if config.run_name is not None else "the run's name, by default, makes"
        raise ConfigError(f"{what} a folder `{name}`: {size}", f"give a --run_name of at most {most} bytes")
    raise ConfigError(f"a part of the run's path, `{name}`, has {size}", "give another --home")


def default_run_name(config: TrainConfig) -> str:
    """Return `{model_name}-{8 hex digits}` of the settings that shape the result: the same command, the same run.

    Settings that came after the first runs count where they aren't at their defaults, so that none of them
    renames a run that doesn't use it.
    """
    shaping = {
        name: value
        for name, value in sorted(dump_settings(config).items())
        if scope_of(config, name) != "run" and (name in _FIRST_SETTINGS or not _is_default(config, name))
    }
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.model.name}-{digest}"


def scope_of(config: TrainConfig, name: str) -> str:
    """Return what a setting shapes: data, model, training or run."""
    extra = type(config).model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["scope"])


def _is_default(config: TrainConfig, name: str) -> bool:
    field = type(config).model_fields[name]
    # A default may follow other settings.
    default = field.get_default(call_default_factory=True, validated_data=dict(config))
    return bool(getattr(config, name) == default)


def recorded_settings(run: RunDir, model: type[Config]) -> Config:
    """Return the settings of the run's last attempt; one that is newer than the run stands at its default.

    Raises:
        RunError: the run has recorded none, or they can't be read.
        ConfigError: a newer version has recorded settings that are unknown here.
    """
    params = run.read_params()
    return settings_from_dump(model, params["settings"], params["given"])


def check_settings(run: RunDir, config: TrainConfig, recorded_as: TrainConfig | None = None) -> None:
    """Refuse to go on with a run that was started with other settings of its data or model.

    `recorded_as` are its recorded settings, by default as they stand there.

    Raises:
        RunError: it names the settings that differ.
        ConfigError: as `recorded_settings` says.
    """
    recorded = dump_settings(recorded_as or recorded_settings(run, type(config)))
    current = dump_settings(config)
    changed = [name for name in current if recorded[name] != current[name]]
    refused = [name for name in changed if scope_of(config, name) in ("data", "model")]
    if refused:
        listed = ", ".join(f"`{name}` ({recorded[name]!r} → {current[name]!r})" for name in refused)
        raise RunError(
            f"the run `{run.run_name}` was started with other settings of its data or model: {listed}",
            "set them back, or give another --run_name for a new run",
        )
    for name in changed:
        logger.info("`%s` differs from the last attempt: %r → %r", name, recorded[name], current[name])


def check_unchanged(what: str, name: str, recorded: str, current: str) -> None:
    """Refuse to go on with a run whose data set or model, called `name`, isn't what it was.

    Of several data sets, `name` has a comma and a blank between their names.

    Raises:
        RunError: the digests differ.
    """
    if recorded == current:
        return
    names = [name] if _lies_outside_hub(name) else name.split(", ")
    bring_back = "bring it back"
    if not all(map(_lies_outside_hub, names)):
        setting = "--model_revision" if what == "model" else "--dataset_revision"
        bring_back += f" (the hub's older commit: {setting})"
    called = f"the {what} `{name}`"
    if len(names) > 1:
        called = f"one of the {what}s {', '.join(f'`{it}`' for it in names)}"
    raise RunError(
        f"{called} has changed since this run was started ({recorded} → {current})",
        f"{bring_back}, or give another --run_name",
    )


def _lies_outside_hub(name: str) -> bool:
    return is_url(name) or exists(expand_user(name))


def check_unfinished(run: RunDir, config: TrainConfig) -> None:
    """Refuse a run that has finished, and has its result in place.

    Raises:
        RunError: it says what setting would let the run go on.
    """
    if is_finished(run, config) and run.holds_final():
        raise RunError(
            f"the run `{run.run_name}` is finished; its result lies in `{run.final_path}`",
            f"{_how_to_go_on(find_ending(run) or {})}, or give another --run_name",
        )


def is_finished(run: RunDir, config: TrainConfig) -> bool:
    """Return whether the run's newest attempt has finished, and these settings ask for no more than it did."""
    ending = find_ending(run)
    if ending is None or ending["event"] != "finished":
        return False
    if config.max_steps <= ending["step"]:
        return True
    if ending["setting"] == "num_train_epochs":
        return config.num_train_epochs is not None and config.num_train_epochs <= ending["epoch"]
    if ending["setting"] == "early_stopping_patience":
        patience = config.early_stopping_patience
        has_patience = patience == 0 or patience > ending["early_stopping_patience"]
        return config.max_steps <= ending["max_steps"] and not has_patience
    return False


def _how_to_go_on(ending: dict[str, Any]) -> str:
    if ending["setting"] == "num_train_epochs":
        return f"raise --num_train_epochs above {ending['epoch']:g} to go on"
    above = f"raise --max_steps above {ending['max_steps']}"
    if ending["setting"] == "early_stopping_patience":
        above += f", or --early_stopping_patience above {ending['early_stopping_patience']},"
    return f"{above} to go on"


def write_identity(
    run: RunDir,
    config: TrainConfig,
    model: ModelRecord,
    data: DataRecord,
    num_workers: int,
    adapter: AdapterRecord | None = None,
) -> None:
    """Write `params.json`. A resumed run keeps its data, its model, its adapter and its global batch.

    Raises:
        RunError: the data or the model under the same name have changed since the run was started.
    """
    params: dict[str, Any] = {
        "run_name": run.run_name,
        "model_name": run.model_name,
        "global_batch": {
            "microbatches": config.gradient_accumulation_steps * num_workers,
            "sequences_per_microbatch": config.per_device_train_batch_size,
        },
        "dropout_version": _DROPOUT_VERSION,
        "packing": None,
        "resolved": None,
    }
    if run.params_path.exists():
        recorded = run.read_params()
        check_unchanged("data set", data.source, recorded["data"]["fingerprint"], data.fingerprint)
        check_unchanged("model", model.source, recorded["model"]["fingerprint"], model.fingerprint)
        params = {name: recorded[name] for name in params if name in recorded}
    run.write_params(
        {
            **params,
            "settings": dump_settings(config),
            "given": sorted(config.model_fields_set),
            "model": asdict(model),
            **({"adapter": asdict(adapter)} if adapter else {}),
            "data": data.to_json(),
            "versions": dict(_versions()),
        }
    )


def _versions() -> Iterator[tuple[str, str]]:
    yield "tunesmith", tunesmith.__version__
    yield "python", platform.python_version()
    for name in _LIBRARIES:
        # The core runs without Ray.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)
