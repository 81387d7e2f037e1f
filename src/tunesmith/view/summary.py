"""What a run has come to, as the table printed at its end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import ENDINGS, iterate_metrics, read_metrics
from tunesmith.view.progress import (
    EvaluationPoint,
    EventPoint,
    Point,
    TrainingPoint,
    parse_point,
)
from tunesmith.view.units import format_bytes, format_duration, format_loss

_AVERAGED_POINTS = 10
_LABEL_WIDTH = 10


def format_summary(run_dir: RunDir, next_steps: Sequence[tuple[str, str]] = ()) -> RenderableType:
    """Return the table of a run: losses before and after, steps, speed, time, and where things lie.

    `next_steps` are (purpose, command) pairs shown below it, such as ("resume", "tunesmith train …").
    Printed with `soft_wrap=True`, paths and commands stay in one piece to be copied.
    """
    points = [parse_point(line) for line in read_metrics(run_dir.metrics_path)]
    training = [p for p in points if isinstance(p, TrainingPoint)]
    evaluations = [p for p in points if isinstance(p, EvaluationPoint)]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, width=_LABEL_WIDTH)
    table.add_column(overflow="fold")
    table.add_row("run", Text(run_dir.run_name, style="bold"))
    table.add_row("state", _describe_state(points))
    table.add_row("loss", _describe_losses(training, evaluations))
    if training:
        last = training[-1]
        table.add_row("steps", f"{points[-1].step:,}" + (f" of {last.max_steps:,}" if last.max_steps else ""))
        speeds = [p.tokens_per_second for p in training if p.tokens_per_second is not None]
        if speeds:
            table.add_row("speed", f"{statistics.median(speeds):,.0f} tokens/s")
        peaks = [p.peak_memory_bytes for p in training if p.peak_memory_bytes is not None]
        if peaks:
            table.add_row("memory", f"{format_bytes(max(peaks))} at the peak of a worker")
    all_points = (parse_point(line) for line in iterate_metrics(run_dir.metrics_path))
    table.add_row("time", _describe_time(all_points))
    lines = [
        Text.assemble((f"{label:<{_LABEL_WIDTH}}  ", "dim"), str(path)) for label, path in _places(run_dir)
    ]
    for purpose, command in next_steps:
        lines += [Text(f"{purpose}:"), Text(f"  {command}", style="bold")]
    return Group(table, *lines)


def _places(run_dir: RunDir) -> Iterator[tuple[str, Path]]:
    if run_dir.final_path.is_dir():
        is_adapter = (run_dir.final_path / "adapter_config.json").is_file()
        yield "adapter" if is_adapter else "model", run_dir.final_path
    yield "run folder", run_dir.path
    if run_dir.loss_curve_path.is_file():
        yield "loss curve", run_dir.loss_curve_path
    if run_dir.profile_path.is_dir():
        yield "profile", run_dir.profile_path


def _describe_state(points: Sequence[Point]) -> Text:
    endings = [p for p in points if isinstance(p, EventPoint) and p.event in ENDINGS]
    newest = max((p.attempt for p in points), default=0)
    last = max((p for p in endings if p.attempt == newest), key=lambda p: p.time, default=None)
    if last is None:
        return Text("not ended")
    style = {"finished": "green", "stopped": "yellow", "failed": "bold red"}[last.event]
    return Text.assemble((last.event, style), f": {last.message}" if last.message else "")


def _describe_losses(training: Sequence[TrainingPoint], evaluations: Sequence[EvaluationPoint]) -> Text:
    finite = [p for p in evaluations if math.isfinite(p.eval_loss)]
    if len(finite) > 1:
        first, last, best = finite[0], finite[-1], min(finite, key=lambda p: (p.eval_loss, p.step))
        value = Text.assemble(
            f"{format_loss(first.eval_loss)} -> ",
            (format_loss(best.eval_loss), "bold green"),
            f" on the validation set, from step {first.step:,} to {best.step:,}",
        )
        if last.step != best.step:
            value.append(f"; {format_loss(last.eval_loss)} at the end")
        return value
    losses = [p.loss for p in training if math.isfinite(p.loss)]
    if not losses:
        return Text("none measured")
    num_averaged = min(_AVERAGED_POINTS, max(1, len(losses) // 2))
    before, after = (statistics.fmean(part) for part in (losses[:num_averaged], losses[-num_averaged:]))
    return Text.assemble(
        f"{format_loss(before)} -> ",
        (format_loss(after), "bold green"),
        f" in training (means of the first and the last {num_averaged} logged steps)",
    )


def _describe_time(points: Iterable[Point]) -> str:
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    for point in points:
        first.setdefault(point.attempt, point.time)
        last[point.attempt] = point.time
    total_s = sum(last[attempt] - first[attempt] for attempt in first)
    return format_duration(total_s) + (f" in {len(first)} attempts" if len(first) > 1 else "")
