"""The panel that shows a run's present state, as wide as the console it is printed on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunesmith.runs.folder import RUN_PREFIX
from tunesmith.terminal import write_plainly
from tunesmith.view.curves import draw_bars, smooth
from tunesmith.view.progress import RunProgress
from tunesmith.view.units import format_bytes, format_duration, format_loss, format_step_time

_MAX_WIDTH = 120
_LABEL_WIDTH = 11
_CHART_HEIGHT = 3
_MIN_POINTS_TO_SMOOTH = 40
_STATUS_STYLES = {"finished": "green", "stopped": "yellow", "failed": "bold red"}

Row = tuple[str, Text | ProgressBar]


class RunPanel:
    """Draws a run's progress; made anew for each drawing, so that it shows the present."""

    def __init__(self, progress: RunProgress, note: str = "", now: float | None = None) -> None:
        self._progress = progress
        self._note = note
        self._now = time.time() if now is None else now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _MAX_WIDTH)
        value_width = max(20, width - 4 - _LABEL_WIDTH)
        grid = Table.grid(padding=0)
        grid.add_column(width=_LABEL_WIDTH, style="dim", no_wrap=True)
        grid.add_column(width=value_width, overflow="fold")
        name = self._progress.metrics_path.parent.name.removeprefix(RUN_PREFIX)
        title, subtitle = Text(f" {name} ", style="bold"), self._status()
        rows = list(self._rows(value_width, options.ascii_only))
        if options.ascii_only:
            for text in (title, subtitle, *(value for _, value in rows if isinstance(value, Text))):
                text.plain = write_plainly(text.plain, "ascii")
        for label, value in rows:
            grid.add_row(label, value)
        yield Panel(
            grid,
            title=title,
            title_align="left",
            subtitle=subtitle,
            subtitle_align="left",
            border_style="dim",
            width=width,
        )

    def _status(self) -> Text:
        progress = self._progress
        if progress.ending is not None:
            event = progress.ending.event
            message = f": {progress.ending.message}" if progress.ending.message else ""
            return Text(f" {event} at step {progress.ending.step}{message} ", style=_STATUS_STYLES[event])
        if progress.last is None:
            return Text(" no step yet ", style="dim")
        silence_s = progress.silence_s(self._now)
        if silence_s is not None:
            return Text(f" no news for {format_duration(silence_s)} ", style="yellow")
        return Text(" running ", style="cyan")

    def _rows(self, width: int, ascii_only: bool) -> Iterator[Row]:
        yield from self._position_rows(width)
        yield from self._loss_rows(width, ascii_only)
        yield from self._evaluation_rows(width, ascii_only)
        yield from self._speed_rows(width)
        yield from self._event_rows()

    def _position_rows(self, width: int) -> Iterator[Row]:
        step, max_steps = self._progress.step, self._progress.max_steps
        if max_steps is None:
            yield "step", Text(str(step))
        else:
            yield "step", Text(f"{step:,} of {max_steps:,}  ({step / max_steps:.0%})")
            yield "", ProgressBar(total=max_steps, completed=step, width=width)
        parts = []
        eta_s = self._progress.eta_s(self._now)
        if eta_s is not None and step < (max_steps or 0):
            parts.append(f"ETA {format_duration(eta_s)}")
        if self._progress.started_at is not None:
            end = self._progress.ending.time if self._progress.ending else self._now
            parts.append(f"{format_duration(end - self._progress.started_at)} elapsed")
        if self._progress.latest is not None and self._progress.latest.epoch is not None:
            parts.append(f"epoch {self._progress.latest.epoch:.2f}")
        if parts:
            yield "time", _filled(parts, width)

    def _loss_rows(self, width: int, ascii_only: bool) -> Iterator[Row]:
        losses = [point.loss for point in self._progress.training]
        if not losses:
            return
        smoothed = smooth(losses)
        value = Text(format_loss(losses[-1]), style="bold cyan")
        if len(losses) >= _MIN_POINTS_TO_SMOOTH:
            value.append(f"  smoothed {format_loss(float(smoothed[-1]))}", style="cyan")
        if len(losses) > 1:
            value.append(f"  from {format_loss(losses[0])}", style="dim")
        yield "loss", value
        if len(losses) > 1 and not ascii_only:
            for line in draw_bars(smoothed.tolist(), width, _CHART_HEIGHT):
                yield "", Text(line, style="cyan", no_wrap=True)

    def _evaluation_rows(self, width: int, ascii_only: bool) -> Iterator[Row]:
        evaluations, best = self._progress.evaluations, self._progress.best_evaluation()
        if not evaluations:
            return
        last = evaluations[-1]
        value = Text(format_loss(last.eval_loss), style="bold magenta")
        if best is last:
            value.append(f" at step {last.step:,}, the best", style="green")
        else:
            value.append(f" at step {last.step:,}")
            if best is not None:
                value.append(f"  best {format_loss(best.eval_loss)} at step {best.step:,}", style="green")
        room = width - value.cell_len - 2
        if len(evaluations) > 1 and not ascii_only and room >= 5:
            bars = draw_bars([point.eval_loss for point in evaluations], min(room, 30))[0]
            value.append(f"  {bars}", style="magenta")
        yield "eval loss", value

    def _speed_rows(self, width: int) -> Iterator[Row]:
        point = self._progress.latest
        if point is None:
            return
        speed, work = [], []
        if point.tokens_per_second is not None:
            speed.append(f"{point.tokens_per_second:,.0f} tokens/s")
        if point.step_time_s is not None:
            speed.append(f"{format_step_time(point.step_time_s)} per step")
            if point.data_wait_s is not None and point.step_time_s > 0:
                speed.append(f"data wait {point.data_wait_s / point.step_time_s:.0%}")
        if point.mfu is not None:
            speed.append(f"MFU {point.mfu:.0%}")
        if point.peak_memory_bytes is not None:
            work.append(f"peak memory {format_bytes(point.peak_memory_bytes)}")
        if point.learning_rate is not None:
            work.append(f"learning rate {point.learning_rate:.2e}")
        if point.grad_norm is not None:
            work.append(f"grad norm {point.grad_norm:.3g}")
        if speed:
            yield "speed", _filled(speed, width)
        if work:
            yield "", _filled(work, width)

    def _event_rows(self) -> Iterator[Row]:
        starts = {event.attempt: event for event in self._progress.events if event.event == "start"}
        start = starts.get(self._progress.attempt)
        if self._progress.attempt > 1:
            since = f", from step {start.step:,}" if start else ""
            yield "attempt", Text(f"{self._progress.attempt}{since}", style="yellow")
        checkpoints = [event for event in self._progress.events if event.event == "checkpoint"]
        if checkpoints:
            yield "checkpoint", Text(checkpoints[-1].message or f"step {checkpoints[-1].step:,}")
        if self._note:
            yield "", Text(self._note, style="yellow")


def _filled(parts: Iterable[str], width: int) -> Text:
    """Join parts to lines of at most `width`, so that no part is broken."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return Text("\n".join(lines))
