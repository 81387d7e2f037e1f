"""Which tuned model: a run's checkpoint, a PEFT adapter or a Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.config import HFDatasetConfig, ModelRef, TunedModelConfig
from tunesmith.errors import ConfigError, ModelError, RunError
from tunesmith.logs import log_to_file
from tunesmith.paths import expand_user
from tunesmith.remote.copies import copies_in
from tunesmith.runs.base_model import exported_dataset, named_base, recorded_base, recorded_settings
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
    with ExitStack() as stack, copies_in(home):
        if home is not None:
            try:
                stack.enter_context(log_to_file(expand_user(home) / "logs" / f"{log_name}.log"))
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
    folder = expand_user(named) if named is not None else None
    if folder is not None and _holds_model(folder) and not _lies_in_run(folder):
        with copies_in(config.home):
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


def _holds_weights(folder: Path) -> bool:
    weights = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return (folder / "config.json").is_file() and bool(weights)


def _lies_in_run(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() and folder.absolute().parent.name.startswith(RUN_PREFIX)


def _from_run(config: TunedModelConfig, folder: Path | None) -> TunedModel:
    home = expand_user(config.home) if config.home else _DEFAULT_HOME
    if folder is None:
        run, why_run = _newest_run(config, home)
    else:
        run, why_run = open_run(folder, home), ""
    if folder is not None and _lies_in_run(folder):
        checkpoint, why = _named_checkpoint(config, run, folder), "it was named"
    else:
        checkpoint, why = _choose_checkpoint(config, run)
    params = run.read_params()
    recorded = recorded_settings(params)
    with copies_in(run.home):
        base = recorded_base(config, recorded, params, checkpoint.path, trusts=True)
    return TunedModel(
        "state" if recorded.full_ft else "adapter",
        checkpoint.path,
        base,
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
        asked = ModelRef(config.model_path).name
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
    if kind == "adapter" and _holds_weights(folder):
        if not [*folder.glob("adapter_model.*")]:
            raise ModelError(
                f"`{folder}` holds a whole model, and of an adapter `{ADAPTER_CONFIG}` alone, without its weights",
                f"remove {ADAPTER_CONFIG} to take the model as it is",
            )
        logger.warning(
            "`%s` holds an adapter and a whole model: the adapter is taken, on its own base model", folder
        )
    dataset: HFDatasetConfig
    if params:
        dataset = recorded = recorded_settings(params)
        base: ModelRef | None = recorded_base(config, recorded, params, folder, trusts=run is not None)
    else:
        dataset = exported_dataset(origin)
        base = named_base(folder, config, origin)
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
