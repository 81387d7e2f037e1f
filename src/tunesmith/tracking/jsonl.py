"""`metrics.jsonl`, the record that every reader uses; its numbers are copied to the run's trackers.

JSON has no NaN and no infinity, so they are written as the strings "NaN", "Infinity" and "-Infinity", which
`float()` turns back.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from tunesmith.runs.folder import FORMAT_VERSION
from tunesmith.runs.metrics_log import iterate_metrics
from tunesmith.tracking.base import Tracker, warn_of_failure

logger = logging.getLogger(__name__)

Event = Literal["start", "checkpoint", "stopped", "finished", "failed"]

# What only readers of the file need. Every other metric goes to the trackers, under the tag that `tag_of` makes.
FILE_ONLY = frozenset(
    {"epoch", "tokens", "trained_tokens", "max_steps", "step_time_s", "data_wait_s", "peak_memory_bytes"}
)


class MetricsLog:
    """Appends lines to `metrics.jsonl` and copies their numbers to the trackers.

    A tracker that fails is off for the rest of the attempt, with a warning: it never ends a training.
    One writer per file: rank 0 of the run's live attempt. Methods may be called from any thread.
    A line that can't be written (a full disk) is kept and written before the next one.
    """

    def __init__(self, path: Path, attempt: int, trackers: Mapping[str, Tracker]) -> None:
        """Open the file, with a header if it has none.

        Raises:
            RunError: a newer version of this program has written it.
            OSError: it can't be opened.
        """
        self._path = path
        self._attempt = attempt
        self._trackers = dict(trackers)
        self._lock = threading.Lock()
        self._ended_well = False
        self._write_failed = False
        self._file, self._pending = _open_for_append(path)
        self._flush()

    def training(self, step: int, values: Mapping[str, float]) -> None:
        """Record a training step's metrics by name: loss, learning_rate, tokens …"""
        self._append(step, values)
        speed = values.get("tokens_per_second", math.nan)
        logger.info("step %d: loss %.4f, %.0f tokens/s", step, values.get("loss", math.nan), speed)
        self._copy(step, values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record an evaluation's metrics; their names begin with `eval_`, and `eval_loss` is among them.

        Step 0 is before training. Those of a data set are called `eval_NAME_loss`.
        """
        self._append(step, values)
        each = [
            f"{name.removeprefix('eval_').removesuffix('_loss')} {value:.4f}"
            for name, value in values.items()
            if name.endswith("_loss") and name != "eval_loss"
        ]
        details = f" ({', '.join(each)})" if each else ""
        logger.info("step %d: validation loss %.4f%s", step, values["eval_loss"], details)
        self._copy(step, values)

    def event(self, step: int, event: Event, message: str, **details: float | str) -> None:
        """Record that the attempt has started, saved or ended; on disk when this returns."""
        self._append(step, {"event": event, "message": message, **details}, durable=True)
        logger.info("step %d: %s: %s", step, event, message)
        self._ended_well = event in ("finished", "stopped")

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
        self._on_trackers(lambda tracker: tracker.close(failed=not self._ended_well))

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
        tagged = {tag_of(name): value for name, value in values.items() if name not in FILE_ONLY}
        self._on_trackers(lambda tracker: tracker.log(step, tagged))

    def _on_trackers(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # whatever a tracker raises, it must not end the training
                warn_of_failure(name, error)
                self._trackers.pop(name, None)


class NoLog:
    """The log of every rank but 0: the same verbs, and nothing is recorded."""

    def training(self, step: int, values: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, step: int, event: Event, message: str, **details: float | str) -> None: ...

    def close(self) -> None: ...


def tag_of(metric: str) -> str:
    """Return a metric's name on dashboards, grouped: `loss` → `train/loss`, `eval_loss` → `eval/loss`."""
    return f"eval/{metric.removeprefix('eval_')}" if metric.startswith("eval_") else f"train/{metric}"


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
