"""The run folder: the only code that knows its names, and how a checkpoint is chosen from it.

{home}/
  logs/fine_tune.log
  datasets/{fingerprint}/
  compiled/
  results/{model_name}/
    ray_results/TorchTrainer_{run_name}/
      params.json  metrics.jsonl  lease.json  checkpoint_00000100/
      evaluation/checkpoint_00000100/  prior_adapter/  profile/
    final/  hf_format/
  tensorboard_logs/{model_name}/{run_name}/
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.atomic_files import remove_folder, repair_folder, write_json
from tunesmith.errors import ConfigError, RunError
from tunesmith.paths import expand_user

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
RUN_PREFIX = "TorchTrainer_"
STATE_FILE = "trainer_state.json"
ORIGIN_FILE = "tunesmith.json"
ADAPTER_CONFIG = "adapter_config.json"
_CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, its step, and the validation loss measured at that step, in nats."""

    path: Path
    step: int
    eval_loss: float | None


@dataclass(frozen=True)
class RunDir:
    """Where a run's files lie. Making one touches nothing on disk."""

    home: Path
    results_dir: str
    model_name: str
    run_name: str

    @property
    def _model_path(self) -> Path:
        return self.home / self.results_dir / self.model_name

    @property
    def path(self) -> Path:
        return self._model_path / "ray_results" / f"{RUN_PREFIX}{self.run_name}"

    @property
    def params_path(self) -> Path:
        return self.path / "params.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def lease_path(self) -> Path:
        return self.path / "lease.json"

    @property
    def stop_path(self) -> Path:
        """A file that asks the workers to end after the current step and save."""
        return self.path / "stop_requested"

    @property
    def shortages_path(self) -> Path:
        """The ranks that ran out of a GPU's memory, one a line."""
        return self.path / "out_of_memory"

    @property
    def final_path(self) -> Path:
        return self._model_path / "final"

    @property
    def export_path(self) -> Path:
        return self._model_path / "hf_format"

    @property
    def prior_path(self) -> Path:
        """The adapter that the run went on from, as it was then."""
        return self.path / "prior_adapter"

    @property
    def profile_path(self) -> Path:
        return self.path / "profile"

    @property
    def loss_curve_path(self) -> Path:
        return self.path / "loss_curve.png"

    @property
    def datasets_path(self) -> Path:
        return self.home / "datasets"

    @property
    def compiled_path(self) -> Path:
        """What torch compiled for the workers."""
        return self.home / "compiled"

    @property
    def tensorboard_path(self) -> Path:
        return self.home / "tensorboard_logs" / self.model_name / self.run_name

    def log_path(self, verb: str = "fine_tune") -> Path:
        return self.home / "logs" / f"{verb}.log"

    def evaluation_path(self, checkpoint: str) -> Path:
        """Folder of what an evaluation of that checkpoint, or of `final`, has found."""
        return self.path / "evaluation" / checkpoint

    def serving_path(self, name: str) -> Path:
        """Folder of whole weights that were made to be served."""
        return self.path / "serving" / name

    def checkpoint_path(self, step: int) -> Path:
        return self.path / f"checkpoint_{step:08d}"

    def unfinished_path(self, step: int, token: str) -> Path:
        """Folder that a checkpoint is written in before it gets its name; unique to one attempt."""
        return self.path / f".unfinished_{step:08d}_{token}"

    def checkpoints(self) -> list[Checkpoint]:
        """Return the whole checkpoints by step. A folder gets its name only when everything is in it."""
        found = []
        for path in self.path.glob("checkpoint_*"):
            name = _CHECKPOINT_NAME.fullmatch(path.name)
            if name and (path / STATE_FILE).is_file():
                state = read_versioned_json(path / STATE_FILE)
                found.append(Checkpoint(path, int(name[1]), state["eval_loss"]))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint of the highest step, or None."""
        return next(iter(self.checkpoints()[::-1]), None)

    def best_checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint of the lowest validation loss; the latest where none was measured."""
        measured = [c for c in self.checkpoints() if c.eval_loss is not None and math.isfinite(c.eval_loss)]
        return min(measured, key=lambda c: (c.eval_loss, c.step)) if measured else self.latest_checkpoint()

    def discard_checkpoints(self, keep_newest: int) -> None:
        """Delete all but the newest `keep_newest` checkpoints and the best one."""
        best = self.best_checkpoint()
        for checkpoint in self.checkpoints()[:-keep_newest]:
            if best is None or checkpoint.path != best.path:
                remove_folder(checkpoint.path)

    def check_writable(self) -> None:
        """Refuse a home that can't be written.

        Raises:
            ConfigError: with the folder that is in the way.
        """
        folder = self.home
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"`home` is `{self.home}`, but `{folder}` can't be written", "choose another --home"
            )

    def clean(self) -> None:
        """Put right what a killed attempt left; only the holder of the lease may call it."""
        self.discard_unfinished()
        repair_folder(self.final_path)
        self.stop_path.unlink(missing_ok=True)

    def discard_unfinished(self) -> None:
        """Delete checkpoints that were never whole, or are no longer; only while nobody writes one."""
        for path in [*self.path.glob(".unfinished_*"), *self.path.glob(".removed_*")]:
            shutil.rmtree(path, ignore_errors=True)

    def holds_final(self) -> bool:
        """Return whether `final/` is there and comes from this run's best checkpoint."""
        path, best = self.final_path / ORIGIN_FILE, self.best_checkpoint()
        if best is None or not path.exists():
            return False
        origin = read_versioned_json(path)
        return (origin["run"], origin["checkpoint"]) == (self.path.name, best.path.name)

    def read_params(self) -> dict[str, Any]:
        """Return `params.json`.

        Raises:
            RunError: it is absent, torn, or of a newer format.
        """
        return read_versioned_json(self.params_path)

    def write_params(self, params: dict[str, Any]) -> None:
        write_json(self.params_path, {"format_version": FORMAT_VERSION, **params})


def find_runs(home: Path | str) -> list[RunDir]:
    """Return the runs of a home, or of the homes in a folder such as `runs`."""
    folder = expand_user(home)
    depths = (f"*/*/ray_results/{RUN_PREFIX}*", f"*/*/*/ray_results/{RUN_PREFIX}*")
    found = [path for depth in depths for path in sorted(folder.glob(depth))]
    return [_run_of_folder(path) for path in found if path.is_dir()]


def open_run(path: Path | str, home: Path | str | None = None) -> RunDir:
    """Find a run from its folder, a checkpoint in it, a home that holds one run, or its name under `home`.

    Raises:
        RunError: there is no such run, or the home holds several.
    """
    given = expand_user(path)
    for folder in (given, *given.absolute().parents[:1]):
        if folder.name.startswith(RUN_PREFIX) and folder.is_dir():
            return _run_of_folder(folder)
    named = [run for run in find_runs(home) if run.run_name == str(path)] if home is not None else []
    runs = named or find_runs(given)
    if len(runs) == 1:
        return runs[0]
    if runs:
        names = ", ".join(f"`{run.path}`" for run in runs)
        raise RunError(f"`{path}` holds {len(runs)} runs", f"name one of {names}")
    raise RunError(
        f"no run at `{path}`",
        f"give the folder `…/ray_results/{RUN_PREFIX}{{run_name}}`, its home or its name",
    )


def _run_of_folder(folder: Path) -> RunDir:
    model = folder.absolute().parents[1]
    return RunDir(model.parents[1], model.parent.name, model.name, folder.name.removeprefix(RUN_PREFIX))


def check_format_version(content: dict[str, Any], path: Path) -> None:
    """Refuse what a newer version of this program has written."""
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise RunError(
            f"`{path}` has format version {version}; this tunesmith reads up to {FORMAT_VERSION}",
            "upgrade tunesmith",
        )


def read_versioned_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that carries a `format_version` this program knows."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"`{path}` does not exist", "is this a run folder of tunesmith?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"`{path}` is not valid JSON: {error}", "restore it from a checkpoint's copy"
        ) from None
    check_format_version(content, path)
    return dict(content)
