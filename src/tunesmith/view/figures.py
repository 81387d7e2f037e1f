"""Pictures of a run for reports; matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.atomic_files import write_bytes
from tunesmith.errors import RunError
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import read_metrics
from tunesmith.view.curves import smooth
from tunesmith.view.progress import EvaluationPoint, EventPoint, TrainingPoint, parse_point
from tunesmith.view.units import format_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any colour vision.
_TRAINING_COLOUR = "#0072B2"
_EVALUATION_COLOUR = "#D55E00"
_TEXT_COLOUR = "#333333"
_QUIET_COLOUR = "#8A8A8A"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": _QUIET_COLOUR,
    "axes.labelcolor": _TEXT_COLOUR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _TEXT_COLOUR,
    "ytick.color": _TEXT_COLOUR,
    "text.color": _TEXT_COLOUR,
}


def draw_loss_curve(run_dir: RunDir, path: Path) -> None:
    """Write a PNG of a run's losses by step: training, validation, restarts.

    Raises:
        RunError: the run has no finite loss yet, or a newer version of this program has written it.
    """
    picture = render_loss_curve(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, [picture])


def render_loss_curve(run_dir: RunDir) -> bytes:
    """Return what `draw_loss_curve` writes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [parse_point(line) for line in read_metrics(run_dir.metrics_path)]
    training = [p for p in points if isinstance(p, TrainingPoint) and math.isfinite(p.loss)]
    evaluations = [p for p in points if isinstance(p, EvaluationPoint) and math.isfinite(p.eval_loss)]
    restarts = sorted(
        {p.step for p in points if isinstance(p, EventPoint) and p.event == "start" and p.attempt > 1}
    )
    if not training and not evaluations:
        raise RunError(f"`{run_dir.metrics_path}` holds no loss to draw", "wait for the first logged step")

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4.5), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw_training(axes, training)
        _draw_evaluations(axes, evaluations)
        _draw_restarts(axes, restarts)
        _dress(axes, run_dir.run_name, training, evaluations)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_training(axes: Axes, training: Sequence[TrainingPoint]) -> None:
    if not training:
        return
    steps, losses = [p.step for p in training], [p.loss for p in training]
    if len(training) < 20:
        axes.plot(
            steps, losses, color=_TRAINING_COLOUR, linewidth=1.8, marker="o", markersize=4, label="training"
        )
        return
    axes.plot(steps, losses, color=_TRAINING_COLOUR, alpha=0.25, linewidth=0.8, label="training")
    axes.plot(steps, smooth(losses), color=_TRAINING_COLOUR, linewidth=1.8, label="training, smoothed")


def _draw_evaluations(axes: Axes, evaluations: Sequence[EvaluationPoint]) -> None:
    if not evaluations:
        return
    steps, losses = [p.step for p in evaluations], [p.eval_loss for p in evaluations]
    few = len(evaluations) <= 40
    axes.plot(
        steps,
        losses,
        color=_EVALUATION_COLOUR,
        linewidth=1.2,
        marker="o" if few else None,
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label="validation",
        zorder=4,
    )
    best = min(evaluations, key=lambda p: (p.eval_loss, p.step))
    axes.plot(
        [best.step],
        [best.eval_loss],
        linestyle="none",
        marker="o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=_EVALUATION_COLOUR,
        markeredgewidth=1.4,
        label=f"best validation: {format_loss(best.eval_loss)} at step {best.step:,}",
        zorder=5,
    )


def _draw_restarts(axes: Axes, steps: Sequence[int]) -> None:
    for number, step in enumerate(steps):
        label = ("restart" if len(steps) == 1 else "restarts") if number == 0 else None
        axes.axvline(step, color=_QUIET_COLOUR, linewidth=1, linestyle=(0, (2, 3)), label=label, zorder=1)


def _dress(
    axes: Axes, title: str, training: Sequence[TrainingPoint], evaluations: Sequence[EvaluationPoint]
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontweight="bold", pad=12)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per trained token)")
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(length=3)
    axes.margins(x=0.02)
    axes.set_ylim(_loss_range([p.loss for p in training], [p.eval_loss for p in evaluations]))
    axes.legend(frameon=False, loc="upper right")


def _loss_range(losses: Sequence[float], eval_losses: Sequence[float]) -> tuple[float, float]:
    # A single spike of the raw curve must not flatten everything else.
    shown = [*smooth(losses), *eval_losses, *(np.quantile(losses, [0.003, 0.997]) if losses else [])]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) if high > low else 0.1 * abs(high) + 0.05
    return low - margin, high + margin
