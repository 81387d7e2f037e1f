"""The adapter that a run goes on from, or begins on top of: where it lies, what it takes over of it, what tells it from others."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.atomic_files import replace_folder
from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.model.adapters.folder import ADAPTER_WEIGHT_FILES, FOREIGN_FEATURES, find_adapter_weights
from tunesmith.model.files.fingerprint import sample_weights
from tunesmith.paths import expand_user, is_file
from tunesmith.runs.base_model import read_adapter_config
from tunesmith.runs.folder import ADAPTER_CONFIG, ORIGIN_FILE, RunDir, open_run, read_versioned_json

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "token*",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
)
_WHOLE_FILE_BYTES = 1 << 30

# What a further training leaves out, or can't go on with; the value that leaves it off.
_UNKNOWN_FEATURES = {"bias": "none", "lora_bias": False, "ensure_weight_tying": False, **FOREIGN_FEATURES}
# Begun as a part of the base weights, which PEFT takes away from them again as it loads them.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What a merged adapter may hold besides: the run's own would have to carry it along.
_NOT_MERGED = {"use_dora": False, "modules_to_save": None}


def find_adapter(path: Path) -> Path:
    """Return the folder of the adapter that `path` means: a PEFT folder, or that of a run's best checkpoint.

    Raises:
        ConfigError: there is none.
    """
    folder = expand_user(path)
    if is_file(folder / ADAPTER_CONFIG):
        return folder
    problem = "which holds no adapter_config.json, and is no run"
    try:
        checkpoint = open_run(folder).best_checkpoint()
        if checkpoint is not None and is_file(checkpoint.path / ADAPTER_CONFIG):
            return checkpoint.path
        problem = "a run without a checkpoint of an adapter"
    except RunError as error:
        if folder.is_dir() and "holds" in error.message:
            problem = f"and {error.message}"
    raise ConfigError(
        f"`adapter_path` is `{folder}`, {problem}",
        "give a PEFT folder (adapter_config.json beside adapter_model.safetensors), a run or one of its checkpoints",
    )


def count_rows_needed(settings: Mapping[str, Any]) -> int:
    """Return how many rows the embeddings must have for the tokens that an adapter of these settings trains."""
    indices = settings.get("trainable_token_indices") or []
    ids = [it for ids in indices.values() for it in ids] if isinstance(indices, dict) else indices
    return max(ids, default=-1) + 1


def with_prior_settings(config: TrainConfig) -> TrainConfig:
    """Return the settings with those taken over that the adapter to go on from decides: rank, alpha, targets …

    Raises:
        ConfigError: there is no such adapter, or settings that were given contradict it or one another.
        ModelError: it is of a kind that can't be trained further or merged.
    """
    config.check_adapter()
    if config.adapter_path is None:
        return config
    folder = find_adapter(config.adapter_path)
    found = read_adapter_config(folder)
    _refuse_unknown(folder, found, config.merge_adapter)
    if config.merge_adapter:
        return config
    decided = {
        "lora_rank": found["r"],
        "lora_alpha": float(found["lora_alpha"]),
        "use_rslora": bool(found.get("use_rslora")),
        "use_dora": bool(found.get("use_dora")),
        "lora_target_modules": _targets_of(found),
        "modules_to_save": sorted(found["modules_to_save"]) if found.get("modules_to_save") else None,
    }
    for name, value in decided.items():
        given = getattr(config, name)
        same = sorted(given) == sorted(value) if isinstance(given, list) and value else given == value
        if name in config.model_fields_set and not same:
            raise ConfigError(
                f"`{name}` is {_show(given)}, but the adapter `{folder}` has {_show(value)}",
                f"leave `{name}` out: it is taken over; or begin a fresh adapter on top with --merge_adapter true",
            )
    if "lora_dropout" not in config.model_fields_set:
        decided["lora_dropout"] = float(found.get("lora_dropout") or 0)
    return config.model_copy(update=decided)


def digest_adapter(path: Path) -> str:
    """Return what tells the adapter that `path` means from another: a digest of its settings and weights."""
    folder = find_adapter(path)
    settings = read_adapter_config(folder)
    # Where the base lies may be spelt in many ways.
    content = {
        name: it for name, it in settings.items() if name not in ("base_model_name_or_path", "revision")
    }
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8)
    weights = find_adapter_weights(folder)
    is_small = weights.stat().st_size <= _WHOLE_FILE_BYTES
    digest.update(weights.read_bytes() if is_small else sample_weights(weights))
    return digest.hexdigest()


def keep_adapter(config: TrainConfig, run: RunDir) -> None:
    """Copy the adapter that a run goes on from into the run's folder, once."""
    if config.adapter_path is None or is_file(run.prior_path / ADAPTER_CONFIG):
        return
    source = find_adapter(config.adapter_path)
    with replace_folder(run.prior_path) as folder:
        for pattern in (ADAPTER_CONFIG, *ADAPTER_WEIGHT_FILES, *_TOKENIZER_FILES):
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
    logger.info("the adapter `%s` is kept in `%s`", source, run.prior_path)


def with_kept_adapter(config: TrainConfig, run: RunDir) -> TrainConfig:
    """Return the settings with the run's own copy of its adapter, which stays when the other one goes."""
    if config.adapter_path is None or not is_file(run.prior_path / ADAPTER_CONFIG):
        return config
    return config.model_copy(update={"adapter_path": run.prior_path})


def is_result_of(path: Path, run: RunDir) -> bool:
    """Return whether what lies at `path` is by now what this very run has made, as `final/` of the same home."""
    origin = expand_user(path) / ORIGIN_FILE
    return is_file(origin) and read_versioned_json(origin).get("run") == run.path.name


def _refuse_unknown(folder: Path, found: dict[str, Any], merges: bool) -> None:
    kind = found.get("peft_type")
    reason = None if kind == "LORA" else f"it is a {kind} adapter"
    for name, off in {**_UNKNOWN_FEATURES, **(_NOT_MERGED if merges else {})}.items():
        if (found.get(name) or off) != off:
            reason = reason or f"it sets `{name}`"
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGE_BASE):
        reason = reason or (
            f"it was saved with `init_lora_weights` {start}, which changes the base model (PEFT's save_pretrained "
            "makes a plain one of it with path_initial_model_for_weight_conversion)"
        )
    if reason is not None:
        asked = "merged into the base in memory" if merges else "trained further"
        raise ModelError(
            f"the adapter `{folder}` can't be {asked}: {reason}",
            "export it with `tunesmith convert`, and begin from the export with --model_path",
        )
    find_adapter_weights(folder)


def _targets_of(found: dict[str, Any]) -> list[str] | None:
    """Return the names of what it adapts; None for a pattern, which is PEFT's to match."""
    modules = found.get("target_modules") or []
    if isinstance(modules, str):
        return None
    return sorted([*modules, *(found.get("target_parameters") or [])]) or None


def _show(value: Any) -> str:
    return (
        ",".join(value)
        if isinstance(value, list)
        else "unset"
        if value is None
        else f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
    )
