"""Templates of runs that were begun when backslash-n in YAML still meant a newline."""

from __future__ import annotations

import logging
from typing import Any

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.config.declare import unescape
from tunesmith.config.layers import dump_settings
from tunesmith.runs.identity import locate_run

logger = logging.getLogger(__name__)

_TEMPLATES = ("input_template", "output_template")


def with_recorded_templates(config: TrainConfig) -> TrainConfig:
    """Return the settings with their templates meant as the run began with them, if these settings go on with one."""
    then = _unescaped(config)
    if then == config or _is_recorded(config) or not _is_recorded(then):
        return config
    logger.info(r"the run takes \n and \t in its templates for newline and tab, as it was begun")
    return then


def _unescaped(config: TrainConfig) -> TrainConfig:
    changes: dict[str, Any] = _changes(config)
    if config.datasets is not None:
        changes["datasets"] = [settings.model_copy(update=_changes(settings)) for settings in config.datasets]
    return config.model_copy(update=changes)


def _changes(settings: HFDatasetConfig) -> dict[str, str]:
    return {name: unescape(getattr(settings, name)) for name in _TEMPLATES}


def _is_recorded(config: TrainConfig) -> bool:
    run = locate_run(config)
    if not run.params_path.exists():
        return False
    recorded, current = run.read_params()["settings"], dump_settings(config)
    return all(recorded.get(name) == current[name] for name in (*_TEMPLATES, "datasets"))
