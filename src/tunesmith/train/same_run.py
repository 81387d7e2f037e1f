"""Settings that are spelt otherwise than a run has recorded them, and mean the same: what counts is what they name."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.formats.template import TemplateFormat
from tunesmith.errors import TunesmithError
from tunesmith.model.chat_template import read_if_file
from tunesmith.runs.folder import RunDir, find_runs
from tunesmith.runs.identity import default_run_name, locate_run, recorded_settings

logger = logging.getLogger(__name__)

_TEMPLATE_SETTINGS = ("input_template", "output_template", "field_mapping")


def find_run(config: TrainConfig) -> RunDir:
    """Return the run that these settings mean; touches nothing on disk.

    Without a name of its own that is, where the settings as they are spelt have named none, a run of the same home
    that differs in nothing but the spelling of its files and templates.
    """
    run = locate_run(config)
    if config.run_name is not None or run.params_path.exists():
        return run
    named = re.compile(re.escape(config.model.name) + "-[0-9a-f]{8}")
    for other in find_runs(run.home if config.home is not None else run.home.parent):
        is_beside = (other.results_dir, other.model_name) == (run.results_dir, run.model_name)
        is_own_home = config.home is not None or other.home.name == other.run_name
        if is_beside and is_own_home and named.fullmatch(other.run_name) and _is_meant(other, config):
            logger.info("the run is `%s`: the same files and templates, spelt otherwise", other.run_name)
            return other
    return run


def _is_meant(run: RunDir, config: TrainConfig) -> bool:
    with suppress(TunesmithError, OSError):  # a run of a newer version, or one that is torn
        recorded = recorded_settings(run, type(config))
        return default_run_name(respell(recorded, config)) == default_run_name(config)
    return False


def respell(
    recorded: TrainConfig,
    config: TrainConfig,
    has_same_rows: Callable[[], bool] = lambda: False,
    has_same_model: Callable[[], bool] = lambda: False,
) -> TrainConfig:
    """Return the recorded settings, with what `config` means the same by spelt as there.

    Names of files and folders mean the same if they name the same place, or if the callables, asked only where they
    don't, find the same content there.
    """
    changes: dict[str, Any] = {}
    for name in ("hf_model_id", "model_path"):
        old, new = getattr(recorded, name), getattr(config, name)
        if old != new and _is_place(new) and (_is_same_place(old, new) or has_same_model()):
            changes[name] = new
    if _is_same_place(recorded.adapter_path, config.adapter_path):
        changes["adapter_path"] = config.adapter_path
    templates = [it.chat_template and read_if_file(it.chat_template) for it in (recorded, config)]
    if templates[0] == templates[1]:
        changes["chat_template"] = config.chat_template
    if len(recorded.data_sets) == len(config.data_sets):
        pairs = list(zip(recorded.data_sets, config.data_sets, strict=True))
        named = [(old.dataset_name, new.dataset_name) for old, new in pairs]
        is_same = all(old == new or _is_same_place(old, new) for old, new in named) or has_same_rows()
        if recorded.datasets is None:
            changes |= _spelt_as(recorded, config, is_same)
        else:
            changes["datasets"] = [_respell_element(old, new, is_same) for old, new in pairs]
    return recorded.model_copy(update=changes)


def _respell_element(recorded: HFDatasetConfig, config: HFDatasetConfig, is_same: bool) -> HFDatasetConfig:
    changes = _spelt_as(recorded, config, is_same)
    # Of an element, what was given is recorded.
    given = (recorded.model_fields_set - changes.keys()) | (config.model_fields_set & changes.keys())
    return HFDatasetConfig.model_construct(_fields_set=given, **{**dict(recorded), **changes})


def _spelt_as(recorded: HFDatasetConfig, config: HFDatasetConfig, is_same: bool) -> dict[str, Any]:
    """Return the settings of a data set that mean the same in both, as `config` has them."""
    changes: dict[str, Any] = {}
    if is_same and _is_place(config.dataset_name):
        changes["dataset_name"] = config.dataset_name
    for name in ("validation_dataset", "test_dataset"):
        if _is_same_place(getattr(recorded, name), getattr(config, name)):
            changes[name] = getattr(config, name)
    # Without templates of the user's, the columns decide how rows are read.
    if recorded.gives_template and config.gives_template and _template_of(recorded) == _template_of(config):
        changes |= {name: getattr(config, name) for name in _TEMPLATE_SETTINGS}
    return changes


def _template_of(settings: HFDatasetConfig) -> str:
    return TemplateFormat.from_settings(settings).identity()


def _is_place(name: str | Path | None) -> bool:
    return name is not None and Path(name).expanduser().exists()


def _is_same_place(old: str | Path | None, new: str | Path | None) -> bool:
    if old is None or new is None or not _is_place(old):
        return False
    return Path(old).expanduser().resolve() == Path(new).expanduser().resolve()
