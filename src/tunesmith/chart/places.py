"""Which settings of a run name places on disk, and whether a cluster can mean the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.sources import local_path
from tunesmith.errors import ConfigError, DataError
from tunesmith.remote.copies import check
from tunesmith.urls import is_url

logger = logging.getLogger(__name__)


def refuse_relative_paths(config: TrainConfig, own_home: bool) -> None:
    """Refuse paths that begin in a folder of this machine; `own_home`: without `home` the job gets one.

    Raises:
        ConfigError: there are such paths; all are named.
    """
    relative = {
        name: path
        for name, path in _paths_of(config).items()
        if not path.is_absolute() and not _begins_with_variable(path)
    }
    if not relative:
        return
    named = ", ".join(f"`{name}` is `{path}`" for name, path in relative.items())
    to_home = "none" if own_home else "/…"
    settings = dict.fromkeys(name.partition(".")[0] for name in relative)
    flags = " ".join(f"--{name}={to_home if name == 'home' else '/…'}" for name in settings)
    raise ConfigError(
        f"{named}: relative to a folder of this machine, which the cluster doesn't have",
        f"give absolute paths on a disk that all nodes mount: {flags}",
    )


def warn_of_unmounted_paths(config: TrainConfig, mount_paths: Sequence[str]) -> None:
    """Log which absolute paths lie on none of the claims that the pods mount."""
    for name, path in _paths_of(config).items():
        if not _begins_with_variable(path) and not any(
            PurePosixPath(path).is_relative_to(mount) for mount in mount_paths
        ):
            claims = ", ".join(mount_paths) or "none"
            logger.warning(
                "warning: `%s` is `%s`, on no claim that the pods mount (%s): each pod must have it by itself",
                name,
                path,
                claims,
            )


def check_addresses(config: TrainConfig) -> None:
    """Ask for what the job will fetch, with the credentials of this machine; what can't be asked is left to the job.

    Raises:
        DataError, ModelError: there is nothing at an address.
    """
    if isinstance(config.model_path, str) and "$" not in config.model_path:
        check(config.model_path, "models")
    for url in dict.fromkeys(settings.dataset_name for settings in config.sources):
        if is_url(url) and "$" not in url:
            check(url, "datasets")


def _begins_with_variable(path: Path | str) -> bool:
    """Tell whether where the path begins is told by a variable of the job."""
    return str(path).startswith("$")


def _paths_of(config: TrainConfig) -> dict[str, Path]:
    """Return the settings that name places on disk."""
    paths = {"model_path": config.model_path if isinstance(config.model_path, Path) else None}
    for i, settings in enumerate(config.data_sets):
        name = "dataset_name" if config.datasets is None else f"datasets.{i}.dataset_name"
        paths[name] = _dataset_path(settings)
    for own in config.own_sets:
        place = "" if config.datasets is None or own.number is None else f"datasets.{own.number}."
        trained = None if own.number is None else config.data_sets[own.number].dataset_name
        if own.settings.dataset_name != trained:
            paths[f"{place}{own.part}_dataset"] = _dataset_path(own.settings)
    is_folder = config.model.folder is not None or _begins_with_variable(config.hf_model_id)
    if config.model_path is None and is_folder:
        paths["hf_model_id"] = Path(config.hf_model_id)
    paths |= {"home": config.home, "data_dir": config.data_dir, "adapter_path": config.adapter_path}
    if (template := config.chat_template) is not None and Path(template).suffix in (".jinja", ".json"):
        paths["chat_template"] = Path(template)
    return {name: path for name, path in paths.items() if path is not None}


def _dataset_path(settings: HFDatasetConfig) -> Path | None:
    if is_url(settings.dataset_name):
        return None
    if _begins_with_variable(settings.dataset_name):
        return Path(settings.dataset_name)
    try:
        is_local = local_path(settings) is not None
    except DataError:  # it can only be a path, and isn't here
        is_local = True
    return Path(settings.dataset_name) if is_local else None
