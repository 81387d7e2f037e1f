"""What a tuned model was made from: its base model, and the settings that rendered its rows."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.config import HFDatasetConfig, ModelRef, TrainConfig, TunedModelConfig
from tunesmith.config.layers import settings_from_dump
from tunesmith.config.model_ref import refer_to
from tunesmith.errors import ModelError
from tunesmith.paths import expand_user
from tunesmith.remote.copies import fetch
from tunesmith.runs.folder import ADAPTER_CONFIG
from tunesmith.urls import is_url

_COMMIT = re.compile("[0-9a-f]{40}")


def recorded_settings(params: dict[str, Any]) -> TrainConfig:
    """Return the settings of a run's newest attempt, from its `params.json`."""
    return settings_from_dump(TrainConfig, params["settings"], params["given"])


def recorded_base(
    config: TunedModelConfig, recorded: TrainConfig, params: dict[str, Any], folder: Path, trusts: bool
) -> ModelRef:
    """Return the run's base model; `trusts`: the run's own word on foreign code counts."""
    trusted = config.trust_remote_code or (trusts and recorded.trust_remote_code)
    changes: dict[str, Any] = {"trust_remote_code": trusted}
    same_name = config.base_model.rsplit("/", 1)[-1] == params["model_name"]
    means_recorded = same_name and (
        recorded.model_path is not None or config.base_model == recorded.hf_model_id
    )
    if config.model_path is not None:
        changes["model_path"] = _here(config.model_path)
    elif "base_model" in config.model_fields_set and not means_recorded:
        changes |= {"model_path": None, "hf_model_id": config.base_model, "model_revision": None}
    elif recorded.model_path is not None or params["model"].get("path") is not None:
        changes["model_path"] = _recorded_path(params["model"], folder)
    elif _COMMIT.fullmatch(params["model"]["fingerprint"]):
        changes["model_revision"] = params["model"]["fingerprint"]
    base = recorded.model_copy(update=changes).model
    return replace(base, given_as="base_model") if "hf_model_id" in changes else base


def _here(place: Path | str) -> Path:
    """Return the folder at a path, or the copy of what lies at an address, as an absolute path."""
    return expand_user(place).absolute() if isinstance(place, Path) else fetch(place, "models")


def _recorded_path(model: dict[str, Any], folder: Path) -> Path:
    """Return where the run's local base model lies now: it was recorded from the folder the run was started in.

    A copy of what lies at an address is fetched again if it is gone.
    """
    candidates = [Path(model.get("path") or model["source"]), Path(model["source"]).expanduser()]
    if (folder / ADAPTER_CONFIG).is_file():
        candidates.append(Path(read_adapter_config(folder)["base_model_name_or_path"] or ""))
    found = next((path for path in candidates if (path / "config.json").is_file()), None)
    if found is None and is_url(model["source"]):
        return fetch(model["source"], "models")
    if found is None:
        raise ModelError(
            f"the base model of this run, `{model['source']}`, is not there any more", "give its --model_path"
        )
    return found.absolute()


def named_base(folder: Path, config: TunedModelConfig, origin: dict[str, Any]) -> ModelRef | None:
    """Return the base model of what no run is known for: as given, else as recorded beside the weights."""
    trusts = config.trust_remote_code
    if config.model_path is not None:
        return ModelRef(_here(config.model_path), None, trusts)
    if "base_model" in config.model_fields_set:
        return refer_to(config.base_model, None, trusts, "base_model")
    source, revision = origin.get("base"), None
    if source is not None and "/" not in source:  # the name of a local folder: where that lies isn't recorded
        source = None
    if (folder / ADAPTER_CONFIG).is_file():
        adapter = read_adapter_config(folder)
        source, revision = adapter.get("base_model_name_or_path"), adapter.get("revision")
        if not source:
            raise ModelError(
                f"the adapter `{folder}` doesn't record its base model", "give --model_path or --base_model"
            )
    if not source:
        return None
    if Path(source).expanduser().is_dir():
        return ModelRef(Path(source).expanduser().absolute(), None, trusts)
    if source.startswith(("/", ".", "~")):
        raise ModelError(f"the base model of `{folder}`, `{source}`, is not there", "give its --model_path")
    return ModelRef(source, revision, trusts)


def exported_dataset(origin: dict[str, Any]) -> HFDatasetConfig:
    """Return the settings that rendered the rows of the run that an export came from."""
    templates = dict(origin.get("templates", {}))
    if templates.pop("row_format", None) == "template":
        return HFDatasetConfig(**templates)
    return HFDatasetConfig(**{name: templates[name] for name in ("system_prompt",) if name in templates})


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return `adapter_config.json`.

    Raises:
        ModelError: it isn't valid JSON.
    """
    path = folder / ADAPTER_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"`{path}` is not valid JSON: {error}", "get the adapter again") from error
    if not isinstance(content, dict):
        raise ModelError(f"`{path}` holds no settings of an adapter", "get the adapter again")
    return content
