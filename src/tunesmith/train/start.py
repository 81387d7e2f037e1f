"""Whether a training can start: what is checked before anything is written, and what is recorded then."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tunesmith.config import TrainConfig
from tunesmith.data.prepare import Prepared, rendering_version_of
from tunesmith.data.shares import measure_shares
from tunesmith.data.sources import sources_fingerprint
from tunesmith.model.adapters.prior import digest_adapter, find_adapter, is_result_of, keep_adapter
from tunesmith.model.attention_choice import check_attention
from tunesmith.model.files.fetched import with_model_here
from tunesmith.model.files.fingerprint import model_fingerprint
from tunesmith.model.load import build_meta_model, load_model_config
from tunesmith.model.positions import check_length
from tunesmith.model.quantized import check_quantization
from tunesmith.model.vocabulary import count_known_tokens
from tunesmith.runs.base_model import read_adapter_config
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import (
    AdapterRecord,
    DataRecord,
    ModelRecord,
    check_settings,
    check_unchanged,
    check_unfinished,
    recorded_settings,
    write_identity,
)
from tunesmith.train.same_run import respell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_model(config: TrainConfig) -> int:
    """Check, without its weights, that the model can be trained as asked; return how many tokens it knows.

    Raises:
        ModelError, ConfigError: as `load_model_config`, `check_quantization`, `build_meta_model`, `check_length` and
            `adapt_model` say.
    """
    model_config = load_model_config(config.model)
    check_quantization(model_config, str(config.model.source))
    model = build_meta_model(config.model, model_config)
    check_length(model, config.max_seq_length, "max_seq_length", str(config.model.source))
    check_attention(config.attn_implementation, model, str(config.model.source))
    if config.adapter_path is not None:
        _check_prior_fits(model, config)
    if config.adapts_more:
        import torch

        from tunesmith.model.adapters.adapted import adapt_model

        with torch.device("meta"):
            adapt_model(model, config, torch.float32)
    elif not config.full_ft:
        from tunesmith.model.adapters.targets import choose_targets

        choose_targets(model, config)
    return count_known_tokens(model)


def _check_prior_fits(model: PreTrainedModel, config: TrainConfig) -> None:
    """Refuse an adapter to go on from, or on top of, whose matrices aren't those of `model`.

    Raises:
        ModelError: it names modules that are absent, or whose shapes differ.
    """
    from tunesmith.model.adapters.folder import read_adapter_shapes
    from tunesmith.model.fit import check_adapter_fits

    assert config.adapter_path is not None
    folder = find_adapter(config.adapter_path)
    settings = read_adapter_config(folder)
    check_adapter_fits(model, read_adapter_shapes(folder), str(config.model.source), settings)


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
    _record_adapter(run, config)


def _record_adapter(run: RunDir, config: TrainConfig) -> AdapterRecord | None:
    """Return what is recorded of the adapter that a run goes on from, or on top of, if there is one.

    Raises:
        RunError: the one at its place has changed since the run was started.
    """
    if config.adapter_path is None:
        return None
    source = str(config.adapter_path)
    fingerprint = digest_adapter(config.adapter_path)
    recorded = run.read_params().get("adapter") if run.params_path.exists() else None
    if recorded is None:
        return AdapterRecord(source, fingerprint)
    if not is_result_of(config.adapter_path, run):  # the same home's final/ is by now this run's own
        check_unchanged("adapter", source, recorded["fingerprint"], fingerprint)
    return AdapterRecord(source, recorded["fingerprint"])


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
    write_identity(run, config, model, data, num_workers, _record_adapter(run, config))
    keep_adapter(config, run)


def _measure_shares(config: TrainConfig, prepared: Prepared) -> list[dict[str, Any]] | None:
    if len(config.data_sets) == 1:
        return None
    return [asdict(share) for share in measure_shares(prepared.train, config.data_sets)]


def _name_data(config: TrainConfig) -> str:
    # Another split of the same set has its name.
    return ", ".join(dict.fromkeys(settings.dataset_name for settings in config.sources))
