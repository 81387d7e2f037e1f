"""Which tuned model: a run's checkpoint, a PEFT adapter or a Hugging Face folder, and what it was tuned from."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.config import HFDatasetConfig, ModelRef, TrainConfig, TunedModelConfig
from tunesmith.config.layers import settings_from_dump
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.logs import log_to_file
from tunesmith.runs.folder import (
    ADAPTER_CONFIG,
    ORIGIN_FILE,
    RUN_PREFIX,
    STATE_FILE,
    Checkpoint,
    RunDir,
    find_runs,
    open_run,
    read_versioned_json,
)
from tunesmith.runs.metrics_log import iterate_metrics

logger = logging.getLogger(__name__)

Kind = Literal["adapter", "state", "model"]

_DEFAULT_HOME = Path("runs")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class TunedModel:
    """A tuned model, found.

    `kind`: `adapter` is a PEFT folder (a LoRA run's checkpoint is one), `state` a full fine-tuning's
    checkpoint with its weights in `state/`, `model` a Hugging Face folder.
    `base` is None where no base model is known, which only a `model` can be. `dataset` holds the settings
    that rendered its rows, as far as they are known. `run`, `params` (its params.json), `step` and
    `eval_loss` (nats) are None for what no run recorded. `why` tells why this one was taken.
    """

    kind: Kind
    folder: Path
    base: ModelRef | None
    run: RunDir | None = None
    params: dict[str, Any] | None = None
    step: int | None = None
    eval_loss: float | None = None
    why: str = "it was named"
    dataset: HFDatasetConfig = field(default_factory=HFDatasetConfig)

    @property
    def label(self) -> str:
        """What to call it: `checkpoint_00000040 of SmolLM2-5e1f22aa`, or its folder's name."""
        return f"{self.folder.name} of {self.run.run_name}" if self.run else self.folder.name

    @property
    def data_dir(self) -> Path | None:
        """Folder of the run's training.jsonl, validation.jsonl and test.jsonl; None where no run recorded one."""
        if self.params is None:
            return None
        recorded = Path(self.params["data"]["data_dir"])
        # The home may be mounted elsewhere by now.
        moved = self.run.datasets_path / recorded.name if self.run else recorded
        return recorded if recorded.is_dir() else moved


@contextmanager
def taken(config: TunedModelConfig, log_name: str) -> Iterator[TunedModel]:
    """Give what `find_tuned` returns; log which and why, and all inside, to `{home}/logs/{log_name}.log`."""
    tuned = find_tuned(config)
    home = tuned.run.home if tuned.run else config.home
    with ExitStack() as stack:
        if home is not None:
            try:
                stack.enter_context(log_to_file(home.expanduser() / "logs" / f"{log_name}.log"))
            except OSError as error:
                logger.warning("there will be no log in `%s`: %s", home, error.strerror or error)
        logger.info("taking %s: %s (`%s`)", tuned.label, tuned.why, tuned.folder)
        yield tuned


def find_tuned(config: TunedModelConfig) -> TunedModel:
    """Return the tuned model that these settings mean.

    Raises:
        RunError: there is no such run, or it has no such checkpoint.
        ModelError: the folder holds no model, or its base model isn't known.
        ConfigError: settings contradict what was recorded.
    """
    named = config.checkpoints_dir
    if named is not None:
        _refuse_unfinished(Path(named))
    folder = Path(named).expanduser() if named is not None else None
    if folder is not None and _holds_model(folder) and not _lies_in_run(folder):
        return _from_folder(folder.absolute(), config)
    return _from_run(config, folder)


def _refuse_unfinished(folder: Path) -> None:
    if folder.name.startswith((".unfinished_", ".removed_")):
        raise RunError(
            f"`{folder}` is a checkpoint that was never finished, or is being removed",
            "name the run; its whole checkpoints are called checkpoint_…",
        )


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json", STATE_FILE))


def _lies_in_run(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() and folder.absolute().parent.name.startswith(RUN_PREFIX)


def _from_run(config: TunedModelConfig, folder: Path | None) -> TunedModel:
    home = config.home.expanduser() if config.home else _DEFAULT_HOME
    if folder is None:
        run, why_run = _newest_run(config, home)
    else:
        run, why_run = open_run(folder, home), ""
    if folder is not None and _lies_in_run(folder):
        checkpoint, why = _named_checkpoint(config, run, folder), "it was named"
    else:
        checkpoint, why = _choose_checkpoint(config, run)
    params = run.read_params()
    recorded = _recorded_settings(params)
    return TunedModel(
        "state" if recorded.full_ft else "adapter",
        checkpoint.path,
        _recorded_base(config, recorded, params, checkpoint.path, trusts=True),
        run,
        params,
        checkpoint.step,
        checkpoint.eval_loss,
        f"{why}{why_run}",
        recorded,
    )


def _newest_run(config: TunedModelConfig, home: Path) -> tuple[RunDir, str]:
    runs = find_runs(home)
    if not runs:
        raise RunError(
            f"there is no run under `{home}`",
            "name a run, a checkpoint, an adapter or a model folder: `tunesmith evaluate PATH`, or give --home",
        )
    asked = config.base_model.rstrip("/").rsplit("/", 1)[-1]
    if config.model_path is not None and "base_model" not in config.model_fields_set:
        asked = config.model_path.resolve().name
    matching = [run for run in runs if run.model_name == asked]
    if not matching and {"base_model", "model_path"} & config.model_fields_set:
        found = ", ".join(sorted({f"`{run.model_name}`" for run in runs}))
        raise RunError(
            f"there is no run of `{asked}` under `{home}`", f"there are runs of {found}; or give --home"
        )
    newest = max(matching or runs, key=_last_active)
    of_model = f" of {asked}" if matching else ""
    return newest, f"; the run is the newest{of_model} of {len(matching or runs)} under `{home}`"


def _last_active(run: RunDir) -> float:
    return max((float(line["time"]) for line in iterate_metrics(run.metrics_path)), default=0.0)


def _choose_checkpoint(config: TunedModelConfig, run: RunDir) -> tuple[Checkpoint, str]:
    checkpoints = {checkpoint.step: checkpoint for checkpoint in run.checkpoints()}
    if not checkpoints:
        raise RunError(
            f"the run `{run.run_name}` has no whole checkpoint yet",
            f"`tunesmith watch {run.path}` shows how far it is",
        )
    if config.checkpoint.isdecimal():
        if int(config.checkpoint) not in checkpoints:
            steps = ", ".join(str(step) for step in checkpoints)
            raise RunError(
                f"the run `{run.run_name}` has no checkpoint of step {config.checkpoint}",
                f"it has those of {steps}",
            )
        return checkpoints[int(config.checkpoint)], "its step was asked for"
    latest, best = run.latest_checkpoint(), run.best_checkpoint()
    assert latest is not None and best is not None
    if config.checkpoint == "latest":
        return latest, "the latest of the run"
    if best.eval_loss is None:
        return best, "the latest, because the run measured no validation loss"
    return best, f"the best of the run, with a validation loss of {best.eval_loss:.4f}"


def _named_checkpoint(config: TunedModelConfig, run: RunDir, folder: Path) -> Checkpoint:
    found = next((c for c in run.checkpoints() if c.path.samefile(folder)), None)
    if found is None:
        raise RunError(f"`{folder}` is not a whole checkpoint of `{run.path}`", "name the run instead")
    if "checkpoint" in config.model_fields_set and config.checkpoint != str(found.step):
        raise ConfigError(
            f"`checkpoint` is {config.checkpoint}, but `{folder}` is that of step {found.step}",
            "leave one of the two out",
        )
    return found


def _recorded_settings(params: dict[str, Any]) -> TrainConfig:
    return settings_from_dump(TrainConfig, params["settings"], params["given"])


def _recorded_base(
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
        changes["model_path"] = config.model_path.expanduser().absolute()
    elif "base_model" in config.model_fields_set and not means_recorded:
        changes |= {"model_path": None, "hf_model_id": config.base_model, "model_revision": None}
    elif recorded.model_path is not None:
        changes["model_path"] = _recorded_path(params["model"], folder)
    elif _COMMIT.fullmatch(params["model"]["fingerprint"]):
        changes["model_revision"] = params["model"]["fingerprint"]
    return recorded.model_copy(update=changes).model


def _recorded_path(model: dict[str, Any], folder: Path) -> Path:
    """Return where the run's local base model lies now: it was recorded from the folder the run was started in."""
    candidates = [Path(model.get("path") or model["source"]), Path(model["source"]).expanduser()]
    if (folder / ADAPTER_CONFIG).is_file():
        candidates.append(Path(read_adapter_config(folder)["base_model_name_or_path"] or ""))
    found = next((path for path in candidates if (path / "config.json").is_file()), None)
    if found is None:
        raise ModelError(
            f"the base model of this run, `{model['source']}`, is not there any more", "give its --model_path"
        )
    return found.absolute()


def _from_folder(folder: Path, config: TunedModelConfig) -> TunedModel:
    if "checkpoint" in config.model_fields_set:
        raise ConfigError(
            f"`checkpoint` is {config.checkpoint}, but `{folder}` is no run, and holds one model",
            "leave `checkpoint` out, or name the run",
        )
    run, params, origin = _origin_of(folder)
    kind: Kind = "adapter" if (folder / ADAPTER_CONFIG).is_file() else "model"
    if kind == "model" and (folder / STATE_FILE).is_file():
        kind = "state"
    dataset: HFDatasetConfig
    if params:
        dataset = recorded = _recorded_settings(params)
        base: ModelRef | None = _recorded_base(config, recorded, params, folder, trusts=run is not None)
    else:
        dataset = _exported_dataset(origin)
        base = _named_base(folder, kind, config, origin)
    step, loss = origin.get("step"), origin.get("eval_loss")
    return TunedModel(kind, folder, base, run, params, step, loss, dataset=dataset)


def _origin_of(folder: Path) -> tuple[RunDir | None, dict[str, Any] | None, dict[str, Any]]:
    """Return the run, its params and the step that a folder outside a run came from, as far as they are known.

    `final/` and an export beside it name their run; a copied checkpoint brings its params along.
    """
    if (folder / STATE_FILE).is_file():
        return None, read_versioned_json(folder / "params.json"), read_versioned_json(folder / STATE_FILE)
    if not (folder / ORIGIN_FILE).is_file():
        return None, None, {}
    origin = read_versioned_json(folder / ORIGIN_FILE)
    run_path = folder.parent / "ray_results" / str(origin.get("run"))
    if not (run_path / "params.json").is_file():
        return None, None, origin
    run = open_run(run_path)
    return run, run.read_params(), origin


def _named_base(
    folder: Path, kind: Kind, config: TunedModelConfig, origin: dict[str, Any]
) -> ModelRef | None:
    """Return the base model of what no run is known for: as given, else as recorded beside the weights."""
    trusts = config.trust_remote_code
    if config.model_path is not None:
        return ModelRef(config.model_path.expanduser().absolute(), None, trusts)
    if "base_model" in config.model_fields_set:
        return ModelRef(config.base_model, None, trusts)
    source, revision = origin.get("base"), None
    if source is not None and "/" not in source:  # the name of a local folder: where that lies isn't recorded
        source = None
    if kind == "adapter":
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


def _exported_dataset(origin: dict[str, Any]) -> HFDatasetConfig:
    """Return the settings that rendered the rows of the run that an export came from."""
    templates = dict(origin.get("templates", {}))
    return HFDatasetConfig(**templates if templates.pop("row_format", None) == "template" else {})


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
