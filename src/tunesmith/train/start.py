"""Whether a training can start: what is checked before anything is written, and what is recorded then."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from tunesmith.config import TrainConfig
from tunesmith.data.prepare import Prepared, rendering_version_of
from tunesmith.data.shares import measure_shares
from tunesmith.data.sources import sources_fingerprint
from tunesmith.model.fetched import with_model_here
from tunesmith.model.fingerprint import model_fingerprint
from tunesmith.model.load import build_meta_model, load_model_config
from tunesmith.model.positions import check_length
from tunesmith.model.quantized import check_quantization
from tunesmith.model.vocabulary import count_known_tokens
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import (
    DataRecord,
    ModelRecord,
    check_settings,
    check_unchanged,
    check_unfinished,
    recorded_settings,
    write_identity,
)
from tunesmith.train.same_run import respell

logger = logging.getLogger(__name__)


def check_model(config: TrainConfig) -> int:
    """Check, without its weights, that the model can be trained as asked; return how many tokens it knows.

    Raises:
        ModelError, ConfigError: as `load_model_config`, `check_quantization`, `build_meta_model`, `check_length` and
            `choose_targets` say.
    """
    model_config = load_model_config(config.model)
    check_quantization(model_config, str(config.model.source))
    model = build_meta_model(config.model, model_config)
    check_length(model, config.max_seq_length, "max_seq_length", str(config.model.source))
    if not config.full_ft:
        from tunesmith.model.adapters import choose_targets

        choose_targets(model, config)
    return count_known_tokens(model)


def check_resumable(run: RunDir, config: TrainConfig) -> None:
    """Refuse a run that is finished, or that was started with other data or another model.

    Raises:
        RunError: it names the settings that differ.
    """
    if not run.params_path.exists():
        return
    params = run.read_params()
    source = sources_fingerprint(config.sources, rendering_version_of(params))
    recorded = respell(
        recorded_settings(run, type(config)),
        config,
        has_same_rows=lambda: params["data"]["revision"] == source,
        has_same_model=lambda: _has_same_model(config, params["model"]["fingerprint"]),
    )
    check_settings(run, config, recorded)
    check_unchanged("data set", _name_data(config), params["data"]["revision"], source)
    check_unfinished(run, config)


def _has_same_model(config: TrainConfig, fingerprint: str) -> bool:
    with suppress(OSError):  # no model there, which is told elsewhere
        return model_fingerprint(config.model, like=fingerprint) == fingerprint
    return False


def record_params(run: RunDir, config: TrainConfig, prepared: Prepared, num_workers: int) -> None:
    """Write `params.json`. A resumed run keeps its data, its model and its global batch.

    Raises:
        RunError: the data or the model under the same name have changed since the run was started.
    """
    recorded = run.read_params()["model"]["fingerprint"] if run.params_path.exists() else None
    here = with_model_here(config).model
    model = ModelRecord(
        source=str(config.model.source),
        path=str(here.folder.absolute()) if here.folder else None,
        fingerprint=model_fingerprint(here, like=recorded),
    )
    data = DataRecord(
        source=_name_data(config),
        revision=prepared.source,
        fingerprint=prepared.fingerprint,
        folder=str(prepared.folder),
        data_dir=str(prepared.data_dir),
        row_format=prepared.row_format,
        rendering_version=prepared.rendering_version,
        date=prepared.date,
        shares=_measure_shares(config, prepared),
        end_tokens=prepared.end_tokens,
    )
    write_identity(run, config, model, data, num_workers)


def _measure_shares(config: TrainConfig, prepared: Prepared) -> list[dict[str, Any]] | None:
    if len(config.data_sets) == 1:
        return None
    return [asdict(share) for share in measure_shares(prepared.train, config.data_sets)]


def _name_data(config: TrainConfig) -> str:
    # Another split of the same set has its name.
    return ", ".join(dict.fromkeys(settings.dataset_name for settings in config.sources))
