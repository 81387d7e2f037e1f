"""The live view of a run, from its `metrics.jsonl` alone: a panel on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from tunesmith.runs.folder import open_run
from tunesmith.terminal import write_plainly
from tunesmith.view.panel import RunPanel
from tunesmith.view.progress import EvaluationPoint, EventPoint, Point, RunProgress, TrainingPoint
from tunesmith.view.units import format_duration, format_loss, format_step_time

_REFRESH_S = 0.25
_PLAIN_INTERVAL_S = 10.0
_SILENCE_INTERVAL_S = 60.0


def watch(run: Path | str, once: bool = False, stream: TextIO | None = None) -> None:
    """Show a run until its newest attempt ends or Ctrl-C; `once` prints its present state instead.

    Raises:
        RunError: there is no such run, or a newer version of this program writes it.
    """
    run_dir = open_run(run)
    console = Console(file=stream or sys.stdout)
    if once:
        progress = RunProgress(run_dir.metrics_path)
        progress.poll()
        console.print(RunPanel(progress))
        return
    view = LiveView(run_dir.metrics_path, console, new_attempt=False)
    try:
        view.update()
        while view.progress.ending is None:
            time.sleep(_REFRESH_S)
            view.update()
    except KeyboardInterrupt:
        pass  # leaving the view is no failure
    finally:
        view.close()


class LiveView:
    """Shows a run; the caller's waiting loop calls `update` about four times a second.

    With `new_attempt` the lines that the file already holds are history, and the view waits for an
    attempt that is about to start; without, they are the run's present state.
    """

    def __init__(
        self,
        metrics_path: Path,
        console: Console,
        new_attempt: bool = True,
        plain_interval_s: float = _PLAIN_INTERVAL_S,
    ) -> None:
        self.progress = RunProgress(metrics_path)
        if new_attempt:
            self.progress.poll()
        self._waiting = True
        self._skip_history = not new_attempt
        self._drawing = False
        self._new_note: str | None = None
        note = "starting workers…" if new_attempt else "waiting for the first step…"
        fits = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
        self._display = _Screen(console, note) if fits else _PlainLines(console, note, plain_interval_s)

    def note(self, text: str) -> None:
        """Say what is being done: loading the model, stopping. A signal handler may call it."""
        self._new_note = text
        if not self._drawing:
            self._show_note()

    def _show_note(self) -> None:
        if self._new_note is not None:
            self._display.note(self._new_note)
            self._new_note = None

    def update(self) -> None:
        """Take in what the run has written since the last call, and show it."""
        # A note from a signal handler must not break into a half-written line.
        self._drawing = True
        try:
            self._draw()
        finally:
            self._drawing = False
        self._show_note()

    def _draw(self) -> None:
        points = self.progress.poll()
        if points and self._waiting:
            self._waiting = False
            self._display.begin()
        if points and self._skip_history:
            points = _last_of_each_kind(points)
            self._skip_history = False
        if not self._waiting:
            self._display.show(self.progress, points)

    def close(self) -> None:
        """Show the last state, which stays on the screen, and give the terminal back."""
        self.update()
        self._display.close(self.progress)


class _Screen:
    """A panel that redraws in place."""

    def __init__(self, console: Console, note: str) -> None:
        self._note = note
        self._spinner = Spinner("dots", Text(note))
        self._live = Live(
            self._spinner,
            console=console,
            refresh_per_second=1 / _REFRESH_S,
            # What goes to a file must not end up on the terminal instead.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()

    def note(self, text: str) -> None:
        self._note = text
        self._spinner.update(text=Text(text))

    def begin(self) -> None:
        self._note = ""

    def show(self, progress: RunProgress, points: list[Point]) -> None:
        note = "" if progress.ending else self._note
        self._live.update(RunPanel(progress, note), refresh=True)

    def close(self, progress: RunProgress) -> None:
        self._live.stop()


class _PlainLines:
    """A line now and then, for logs: training steps are thinned out, everything else is shown."""

    def __init__(self, console: Console, note: str, interval_s: float) -> None:
        self._console = console
        self._interval_s = interval_s
        self._held: TrainingPoint | None = None
        self._step_shown_at = float("-inf")
        self._shown_at = time.monotonic()
        self.note(note)

    def note(self, text: str) -> None:
        text = write_plainly(text, self._console.encoding)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._shown_at = time.monotonic()

    def begin(self) -> None: ...

    def show(self, progress: RunProgress, points: list[Point]) -> None:
        for point in points:
            if isinstance(point, TrainingPoint):
                self._held = point
                if (
                    time.monotonic() - self._step_shown_at >= self._interval_s
                    or point.step == point.max_steps
                ):
                    self._show_held(progress)
            elif isinstance(point, EvaluationPoint):
                self.note(_evaluation_line(point, progress))
            else:
                if point is progress.ending:
                    self._show_held(progress)
                self.note(_event_line(point))
        silence_s = progress.silence_s()
        if silence_s is not None and time.monotonic() - self._shown_at >= _SILENCE_INTERVAL_S:
            self.note(f"no news for {format_duration(silence_s)}")

    def close(self, progress: RunProgress) -> None:
        self._show_held(progress)

    def _show_held(self, progress: RunProgress) -> None:
        if self._held is not None:
            self.note(_training_line(self._held, progress))
            self._held = None
            self._step_shown_at = time.monotonic()


def _last_of_each_kind(points: list[Point]) -> list[Point]:
    last = {type(point): point for point in points}
    return [point for point in points if last[type(point)] is point]


def _training_line(point: TrainingPoint, progress: RunProgress) -> str:
    parts = [f"step {point.step}"]
    if point.max_steps is not None:
        parts = [f"step {point.step}/{point.max_steps} ({point.step / point.max_steps:.0%})"]
    parts.append(f"loss {format_loss(point.loss)}")
    if point.learning_rate is not None:
        parts.append(f"lr {point.learning_rate:.2e}")
    if point.tokens_per_second is not None:
        parts.append(f"{point.tokens_per_second:,.0f} tokens/s")
    if point.step_time_s is not None:
        parts.append(f"{format_step_time(point.step_time_s)}/step")
    eta_s = progress.eta_s()
    if eta_s is not None and point.step != point.max_steps:
        parts.append(f"ETA {format_duration(eta_s)}")
    return "  ".join(parts)


def _evaluation_line(point: EvaluationPoint, progress: RunProgress) -> str:
    best = progress.best_evaluation(point.step)
    if best is None:
        mark = ""
    elif best.step == point.step:
        mark = " (best)"
    else:
        mark = f" (best {format_loss(best.eval_loss)} at step {best.step})"
    return f"eval loss {format_loss(point.eval_loss)} at step {point.step}{mark}"


def _event_line(point: EventPoint) -> str:
    if point.event == "checkpoint" and point.message:
        return f"checkpoint: {point.message}"
    what = f"attempt {point.attempt}" if point.event == "start" and point.attempt > 1 else point.event
    return f"{what} at step {point.step}" + (f": {point.message}" if point.message else "")
