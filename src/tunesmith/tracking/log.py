"""What rank 0 records while it trains: `metrics.jsonl`, TensorBoard, Weights & Biases.

`metrics.jsonl` is the record that every reader uses; the other two are copies of it for people's
dashboards, and a failure of theirs never ends a training. JSON has no NaN and no infinity, so they
are written as the strings "NaN", "Infinity" and "-Infinity", which `float()` turns back.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import FORMAT_VERSION, RunDir
from tunesmith.runs.metrics_log import iterate_metrics

logger = logging.getLogger(__name__)

Event = Literal["start", "checkpoint", "stopped", "finished", "failed"]

TRAINING_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "mfu": "train/mfu",
}
EVALUATION_TAG = "eval/loss"

WANDB_PROJECT = "tunesmith"
WANDB_FINISH_TIMEOUT_S = 120
_WANDB_OFFLINE_MODES = ("offline", "dryrun", "disabled")


class Dashboard(Protocol):
    """A copy of the metrics that people look at elsewhere; any method may raise anything."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class MetricsLog:
    """Appends lines to `metrics.jsonl` and copies their numbers to the dashboards.

    One writer per file: rank 0 of the run's live attempt. Methods may be called from any thread.
    A line that can't be written (a full disk) is kept and written before the next one.
    """

    def __init__(self, path: Path, attempt: int, dashboards: Mapping[str, Dashboard]) -> None:
        """Open the file, with a header if it has none.

        Raises:
            RunError: a newer version of this program has written it.
            OSError: it can't be opened.
        """
        self._path = path
        self._attempt = attempt
        self._dashboards = dict(dashboards)
        self._lock = threading.Lock()
        self._failed = False
        self._write_failed = False
        self._file, self._pending = _open_for_append(path)
        self._flush()

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """Record a training step: loss, learning rate, tokens …, under the names of the file's format."""
        self._append(step, values)
        speed = values.get("tokens_per_second", math.nan)
        logger.info("step %d: loss %.4f, %.0f tokens/s", step, values.get("loss", math.nan), speed)
        self._copy(step, {tag: values[name] for name, tag in TRAINING_TAGS.items() if name in values})

    def evaluation(self, step: int, eval_loss: float) -> None:
        """Record a validation loss, in nats per trained token; step 0 is before training."""
        self._append(step, {"eval_loss": eval_loss})
        logger.info("step %d: validation loss %.4f", step, eval_loss)
        self._copy(step, {EVALUATION_TAG: eval_loss})

    def event(self, step: int, event: Event, message: str, **details: float | str) -> None:
        """Record that the attempt has started, saved or ended; on disk when this returns."""
        self._append(step, {"event": event, "message": message, **details}, durable=True)
        logger.info("step %d: %s: %s", step, event, message)
        self._failed = self._failed or event == "failed"

    def close(self) -> None:
        """Write what is left and close everything; a second call does nothing."""
        with self._lock:
            if self._file < 0:
                return
            self._flush()
            if self._pending:
                logger.error(
                    "%d bytes of metrics could not be written to `%s`", len(self._pending), self._path
                )
            os.close(self._file)
            self._file = -1
        for name in list(self._dashboards):
            self._guard(name, lambda dashboard: dashboard.close(self._failed))

    def _append(self, step: int, values: Mapping[str, float | str], durable: bool = False) -> None:
        line = {"step": step, "attempt": self._attempt, **values, "time": round(time.time(), 3)}
        encoded = json.dumps({name: _encode(value) for name, value in line.items()}, allow_nan=False)
        with self._lock:
            self._pending += encoded.encode() + b"\n"
            self._flush(durable)

    def _flush(self, durable: bool = False) -> None:
        try:
            while self._pending:
                written = os.write(self._file, self._pending)
                self._pending = self._pending[written:]
            if durable:
                os.fsync(self._file)
        except OSError as error:
            # The training is worth more than its log, and a full disk may be emptied again.
            if not self._write_failed:
                logger.warning("metrics can't be written to `%s` (%s); kept for later", self._path, error)
            self._write_failed = True
        else:
            self._write_failed = False

    def _copy(self, step: int, values: Mapping[str, float]) -> None:
        for name in list(self._dashboards):
            self._guard(name, lambda dashboard: dashboard.add(step, values))

    def _guard(self, name: str, call: Callable[[Dashboard], None]) -> None:
        try:
            call(self._dashboards[name])
        except Exception as error:  # whatever a dashboard raises, it must not end the training
            _warn_of_dashboard(name, error)
            del self._dashboards[name]


class NoLog:
    """The log of every rank but 0: the same verbs, and nothing is recorded."""

    def training(self, step: int, values: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, eval_loss: float) -> None: ...

    def event(self, step: int, event: Event, message: str, **details: float | str) -> None: ...

    def close(self) -> None: ...


def open_trackers(run_dir: RunDir, config: TrainConfig, attempt: int, start_step: int) -> MetricsLog:
    """Open everything that a run records into. Rank 0 only.

    `start_step` is the step of the checkpoint that this attempt goes on from, 0 without one: what an
    earlier attempt has shown of later steps disappears from TensorBoard.

    Raises:
        ConfigError: `use_wandb` is set and the package is missing.
        RunError: a newer version of this program has written `metrics.jsonl`.
    """
    openers: dict[str, Callable[[], Dashboard]] = {
        "TensorBoard": lambda: _TensorBoard(run_dir.tensorboard_path, start_step)
    }
    if config.use_wandb:
        _require_wandb()
        openers["Weights & Biases"] = lambda: _WeightsAndBiases(run_dir, config)
    dashboards = {}
    for name, opener in openers.items():
        try:
            dashboards[name] = opener()
        except Exception as error:  # as in MetricsLog: a dashboard never ends the training
            _warn_of_dashboard(name, error)
    return MetricsLog(run_dir.metrics_path, attempt, dashboards)


def check_wandb(config: TrainConfig) -> None:
    """Check that Weights & Biases can be used, if the run asks for it; nothing is sent.

    Raises:
        ConfigError: the package is missing, its environment variables are wrong, or no key is configured
            and the mode isn't offline.
    """
    if not config.use_wandb:
        return
    _require_wandb()
    import wandb

    try:
        mode = wandb.setup().settings.mode
    except ValueError as error:
        raise ConfigError(
            f"Weights & Biases refuses its settings: {' '.join(str(error).split())}",
            "correct the `WANDB_…` environment variables",
        ) from None
    if mode in _WANDB_OFFLINE_MODES:
        return
    if not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "`use_wandb` is set, but no Weights & Biases key is configured",
            "run `wandb login` or set `WANDB_API_KEY`; `WANDB_MODE=offline` logs to a local folder alone",
        )


class _TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run_dir: RunDir, config: TrainConfig) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", finish_timeout=WANDB_FINISH_TIMEOUT_S)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
            id=wandb_run_id(run_dir),
            name=run_dir.run_name,
            dir=str(run_dir.home),
            config=config.model_dump(mode="json"),
            resume="allow",
            settings=settings,
        )
        # Its own step counter only rises, and a resumed run repeats steps: ours is the x axis.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        logger.info("Weights & Biases: %s", self._run.dir if self._run.offline else self._run.url)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def wandb_run_id(run_dir: RunDir) -> str:
    """Return the id under which every attempt of a run is one Weights & Biases run."""
    digest = hashlib.sha256(f"{run_dir.model_name}/{run_dir.run_name}".encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', run_dir.run_name)[:50]}-{digest}"


def _require_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "`use_wandb` is set, but the package `wandb` is not installed",
            "pip install 'tunesmith[wandb]', or leave `--use_wandb` out",
        )


def _warn_of_dashboard(name: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    logger.warning("%s is off for the rest of this attempt: %s: %s", name, type(error).__name__, reason)


def _open_for_append(path: Path) -> tuple[int, bytes]:
    """Return the file's descriptor and what must be written before the first line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    next(iterate_metrics(path), None)  # refuses a newer format
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    with path.open("rb") as content:
        if not content.readline().endswith(b"\n"):
            os.ftruncate(file, 0)  # at most a torn header
            return file, json.dumps({"format_version": FORMAT_VERSION}).encode() + b"\n"
        content.seek(-1, os.SEEK_END)
        return file, b"" if content.read() == b"\n" else b"\n"


def _encode(value: object) -> object:
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)  # type: ignore[arg-type]  # NumPy's and torch's scalars too
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
