"""From settings to a run that can start: which run it is, whether it may go on, what it records."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tunesmith
from tunesmith.config import TrainConfig
from tunesmith.config.layers import dump_settings
from tunesmith.data.prepare import Prepared
from tunesmith.data.sources import source_fingerprint
from tunesmith.errors import ConfigError, RunError
from tunesmith.model.load import build_meta_model, load_model_config, model_fingerprint
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import find_ending

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "tokenizers", "ray", "numpy")


def locate_run(config: TrainConfig) -> RunDir:
    """Return the run that these settings mean; touches nothing on disk."""
    run_name = config.run_name or default_run_name(config)
    home = config.home if config.home is not None else Path("runs") / run_name
    return RunDir(home.expanduser().absolute(), config.results_dir, config.model.name, run_name)


def default_run_name(config: TrainConfig) -> str:
    """Return `{model_name}-{8 hex digits}` of the settings that shape the result: the same command, the same run."""
    settings = config.model_dump(mode="json")
    shaping = {name: settings[name] for name in sorted(settings) if scope_of(name) != "run"}
    digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.model.name}-{digest}"


def scope_of(name: str) -> str:
    """Return what a setting shapes: data, model, training or run."""
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["scope"])


def check_writable(run: RunDir) -> None:
    """Refuse a home that can't be written.

    Raises:
        ConfigError: with the folder that is in the way.
    """
    folder = run.home
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"`home` is `{run.home}`, but `{folder}` can't be written", "choose another --home")


def check_model(config: TrainConfig) -> PretrainedConfig:
    """Check, without its weights, that the model can be trained as asked.

    Raises:
        ModelError, ConfigError: as `load_model_config`, `build_meta_model` and `choose_targets` say.
    """
    model_config = load_model_config(config.model)
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.max_seq_length > longest:
        logger.warning(
            "`max_seq_length` is %d, but `%s` was made for %d positions: longer examples train beyond them",
            config.max_seq_length,
            config.model.source,
            longest,
        )
    model = build_meta_model(config.model, model_config)
    if not config.full_ft:
        from tunesmith.model.adapters import choose_targets

        choose_targets(model, config)
    return model_config


def check_resumable(run: RunDir, config: TrainConfig) -> None:
    """Refuse a run that is finished, or that was started with other data or another model.

    Raises:
        RunError: it names the settings that differ.
    """
    if not run.params_path.exists():
        return
    params = run.read_params()
    recorded = params["settings"]
    current = dump_settings(config)
    changed = [name for name in current if name in recorded and recorded[name] != current[name]]
    refused = [name for name in changed if scope_of(name) in ("data", "model")]
    if refused:
        listed = ", ".join(f"`{name}` ({recorded[name]!r} → {current[name]!r})" for name in refused)
        raise RunError(
            f"the run `{run.run_name}` was started with other settings of its data or model: {listed}",
            "set them back, or give another --run_name for a new run",
        )
    revision = source_fingerprint(config)
    if params["data"]["revision"] != revision:
        raise _changed("data set", config.dataset_name, params["data"]["revision"], revision)
    if is_finished(run, config) and run.holds_final():
        raise RunError(
            f"the run `{run.run_name}` is finished; its result lies in `{run.final_path}`",
            f"{_how_to_go_on(find_ending(run) or {})}, or give another --run_name",
        )
    for name in changed:
        logger.info("`%s` differs from the last attempt: %r → %r", name, recorded[name], current[name])


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


def record_params(
    run: RunDir, config: TrainConfig, model_config: PretrainedConfig, prepared: Prepared, num_workers: int
) -> None:
    """Write `params.json`. A resumed run keeps its data, its model and its global batch.

    Raises:
        RunError: the data or the model under the same name have changed since the run was started.
    """
    data = {
        "source": config.dataset_name,
        "revision": prepared.source,
        "fingerprint": prepared.fingerprint,
        "folder": str(prepared.folder),
        "data_dir": str(prepared.data_dir),
        "row_format": prepared.row_format,
    }
    model = {
        "source": str(config.model.source),
        "path": str(config.model.folder.absolute()) if config.model.folder else None,
        "fingerprint": model_fingerprint(config.model, model_config),
    }
    params: dict[str, Any] = {
        "run_name": run.run_name,
        "model_name": run.model_name,
        "global_batch": {
            "microbatches": config.gradient_accumulation_steps * num_workers,
            "sequences_per_microbatch": config.per_device_train_batch_size,
        },
        "packing": None,
        "resolved": None,
    }
    if run.params_path.exists():
        recorded = run.read_params()
        _check_unchanged("data set", config.dataset_name, recorded["data"], data)
        _check_unchanged("model", str(config.model.source), recorded["model"], model)
        params = {name: recorded[name] for name in params}
    run.write_params(
        {
            **params,
            "settings": dump_settings(config),
            "given": sorted(config.model_fields_set),
            "model": model,
            "data": data,
            "versions": _versions(),
        }
    )


def _versions() -> dict[str, str]:
    versions = {"tunesmith": tunesmith.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        # The core runs without Ray.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _check_unchanged(what: str, name: str, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    if recorded["fingerprint"] != current["fingerprint"]:
        raise _changed(what, name, recorded["fingerprint"], current["fingerprint"])


def _changed(what: str, name: str, recorded: str, current: str) -> RunError:
    bring_back = "bring it back"
    if not Path(name).expanduser().exists():
        bring_back += " (the hub's older commit: --model_revision, --dataset_revision)"
    return RunError(
        f"the {what} `{name}` has changed since this run was started ({recorded} → {current})",
        f"{bring_back}, or give another --run_name",
    )
