"""How far a run is, followed line by line from its `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.runs.folder import check_format_version
from tunesmith.runs.metrics_log import ENDINGS

_RECENT_POINTS = 20
_SILENT_AFTER_S = 60.0


@dataclass(frozen=True)
class TrainingPoint:
    """A logged training step; a field is None where the line has none."""

    step: int
    attempt: int
    time: float
    loss: float
    max_steps: int | None
    epoch: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    step_time_s: float | None
    data_wait_s: float | None
    peak_memory_bytes: float | None
    mfu: float | None


@dataclass(frozen=True)
class EvaluationPoint:
    """A validation loss, in nats per trained token."""

    step: int
    attempt: int
    time: float
    eval_loss: float


@dataclass(frozen=True)
class EventPoint:
    """An attempt has started, saved or ended."""

    step: int
    attempt: int
    time: float
    event: str
    message: str


Point = TrainingPoint | EvaluationPoint | EventPoint


def parse_point(line: Mapping[str, Any]) -> Point:
    """Turn a line of `metrics.jsonl` into a point; "NaN" and "Infinity" become floats."""
    step, attempt, at = int(line["step"]), int(line.get("attempt", 1)), float(line.get("time", 0.0))
    if "event" in line:
        return EventPoint(step, attempt, at, str(line["event"]), str(line.get("message", "")))
    if "eval_loss" in line:
        return EvaluationPoint(step, attempt, at, float(line["eval_loss"]))

    def number(name: str) -> float | None:
        return None if line.get(name) is None else float(line[name])

    return TrainingPoint(
        step=step,
        attempt=attempt,
        time=at,
        loss=float(line["loss"]),
        max_steps=None if line.get("max_steps") is None else int(line["max_steps"]),
        epoch=number("epoch"),
        learning_rate=number("learning_rate"),
        grad_norm=number("grad_norm"),
        tokens_per_second=number("tokens_per_second"),
        step_time_s=number("step_time_s"),
        data_wait_s=number("data_wait_s"),
        peak_memory_bytes=number("peak_memory_bytes"),
        mfu=number("mfu"),
    )


class RunProgress:
    """The state of a run as its `metrics.jsonl` tells it; the file may not exist yet.

    `training` and `evaluations` are the points up to the present step, by step, each step's last one:
    those that a resumed attempt has still to repeat are left out. `ending` is the event that has
    ended the newest attempt, None while it runs.
    """

    def __init__(self, metrics_path: Path) -> None:
        self.metrics_path = metrics_path
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._training: dict[int, TrainingPoint] = {}
        self._evaluations: dict[int, EvaluationPoint] = {}
        self._recent: list[TrainingPoint] = []
        self.training: list[TrainingPoint] = []
        self.evaluations: list[EvaluationPoint] = []
        self.events: list[EventPoint] = []
        self.last: Point | None = None
        self.ending: EventPoint | None = None
        self.attempt = 0
        self.step = 0

    def poll(self) -> list[Point]:
        """Read the lines added since the last call; a line without its newline waits for the next.

        Raises:
            RunError: the file is of a newer format.
        """
        points = list(self._read_new())
        for point in points:
            self._take(point)
        if points:
            self.training = [self._training[step] for step in sorted(self._training) if step <= self.step]
            self.evaluations = [
                self._evaluations[step] for step in sorted(self._evaluations) if step <= self.step
            ]
        return points

    def _read_new(self) -> Iterator[Point]:
        try:
            size = self.metrics_path.stat().st_size
        except FileNotFoundError:
            return
        if size < self._offset:
            self._reset()  # the run was deleted and begun anew
        if size == self._offset:
            return
        with self.metrics_path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn when an attempt was killed
            if "format_version" in line:
                check_format_version(line, self.metrics_path)
            else:
                yield parse_point(line)

    def _take(self, point: Point) -> None:
        if point.attempt > self.attempt:
            self.attempt, self.step, self.ending = point.attempt, point.step, None
            self._recent = []
        # The checkpoint of a step is reported from the background, after later steps.
        self.step = max(self.step, point.step)
        self.last = point
        if isinstance(point, TrainingPoint):
            self._training[point.step] = point
            self._recent = [*self._recent[1 - _RECENT_POINTS :], point]
        elif isinstance(point, EvaluationPoint):
            self._evaluations[point.step] = point
        else:
            self.events.append(point)
            self.ending = point if point.event in ENDINGS else self.ending

    @property
    def latest(self) -> TrainingPoint | None:
        """The training point nearest to the present step, of this attempt or the one it goes on from."""
        return self.training[-1] if self.training else None

    def best_evaluation(self, until_step: int | None = None) -> EvaluationPoint | None:
        """The evaluation of the lowest finite loss, up to `until_step` or the present one."""
        until_step = self.step if until_step is None else until_step
        finite = [p for p in self.evaluations if math.isfinite(p.eval_loss) and p.step <= until_step]
        return min(finite, key=lambda point: (point.eval_loss, point.step), default=None)

    @property
    def max_steps(self) -> int | None:
        """Steps that the run will make in all; None before the first training line."""
        return self.latest.max_steps if self.latest else None

    @property
    def started_at(self) -> float | None:
        """Unix time at which the newest attempt wrote its first event, else its first point."""
        starts = [event.time for event in self.events if event.attempt == self.attempt]
        return starts[0] if starts else self._recent[0].time if self._recent else None

    def seconds_per_step(self) -> float | None:
        """Wall time per step of late, evaluations and checkpoints included."""
        if len(self._recent) > 1:
            first, last = self._recent[0], self._recent[-1]
            if last.step > first.step:
                return max(0.0, last.time - first.time) / (last.step - first.step)
        return self._recent[0].step_time_s if self._recent else None

    def eta_s(self, now: float | None = None) -> float | None:
        """Seconds until the last step, None while it can't be told."""
        pace, latest = self.seconds_per_step(), self.latest
        if pace is None or latest is None or latest.max_steps is None or self.ending:
            return None
        since = (time.time() if now is None else now) - self._recent[-1].time
        return max(0.0, (latest.max_steps - latest.step) * pace - max(0.0, since))

    def silence_s(self, now: float | None = None) -> float | None:
        """Seconds since the last line, once that is long for this run; None before, and at an end."""
        if self.last is None or self.ending:
            return None
        gap = 0.0
        if len(self._recent) > 1:
            gap = (self._recent[-1].time - self._recent[0].time) / (len(self._recent) - 1)
        since = (time.time() if now is None else now) - self.last.time
        return since if since > max(_SILENT_AFTER_S, 4 * gap) else None
