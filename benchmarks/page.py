"""Fills docs/performance.md and its picture with what was measured, between the page's markers.

    .venv/bin/python benchmarks/page.py

Numbers are never typed into the page: they come from the files under `results`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from gpu_parts.page import tabulate_gpu
from tables import table
from turn import FOLDER, Figures

from tunesmith.atomic_files import write_text

PAGE = FOLDER.parent / "docs" / "performance.md"
RESULTS = FOLDER / "results"
_SAVE_STEPS = 50
_OURS, _TRL, _TRL_ALL = "tunesmith", "TRL", "TRL, no checkpointing"
_MISSING = "Not measured yet."

Results = Mapping[str, Any]


def write(results_dir: Path = RESULTS, page: Path = PAGE) -> None:
    """Fill every section of the page from the results there are, and draw the picture beside it."""
    cpu, gpu, roofline = (_read(results_dir / f"{name}.json") for name in ("cpu", "gpu", "roofline"))
    sections = {
        "cpu": tabulate_training(cpu) if "training" in cpu else _MISSING,
        "levers": tabulate_levers(cpu) if "levers" in cpu else _MISSING,
        "goals": tabulate_goals(cpu) if cpu else _MISSING,
        "large-data": tabulate_large_data(cpu) if "large-data" in cpu else _MISSING,
        "gpu": tabulate_gpu(gpu) if gpu else _MISSING,
        "roofline": tabulate_roofline(roofline) if roofline else _MISSING,
    }
    text = page.read_text(encoding="utf-8")
    for name, content in sections.items():
        text = fill(text, name, content)
    write_text(page, [text])
    if "training" in cpu:
        draw(read_turns(cpu), page.with_suffix(".svg"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def fill(text: str, name: str, content: str) -> str:
    """Return the page with this content between the markers of the section `name`.

    Raises:
        SystemExit: the page has no such section.
    """
    if not _section(name).search(text):
        raise SystemExit(f"error: the page has no markers <!-- {name} --> and <!-- end of {name} -->")
    return _section(name).sub(lambda found: f"{found[1]}\n{content}\n{found[3]}", text)


def _section(name: str) -> re.Pattern[str]:
    return re.compile(f"(<!-- {name} -->)(.*?)(<!-- end of {name} -->)", re.DOTALL)


def read_turns(cpu: Results, part: str = "training") -> dict[str, list[Figures]]:
    """Return each way's figures by turn."""
    return {name: [Figures(**one) for one in figures] for name, figures in cpu[part]["turns"].items()}


def speed(figures: Figures) -> float:
    """Return the turn's tokens per second; the first step isn't counted."""
    return sum(figures.tokens[1:]) / sum(figures.step_s[1:])


def share_of_limit(figures: Figures) -> float:
    """Return the turn's FLOP/s as a share of those of the matrix products between its steps."""
    return sum(figures.flops[1:]) / sum(figures.step_s[1:]) / median(figures.product_flops_per_s)


def peak_gib(figures: Figures) -> float:
    return figures.peak_bytes / 2**30


def compare(
    turns: Mapping[str, Sequence[Figures]], measure: Callable[[Figures], float], name: str, beside: str
) -> float:
    """Return the median over the turns of one way's figure divided by another's of the same turn."""
    pairs = zip(turns[name], turns[beside], strict=True)
    return median(measure(ours) / measure(theirs) for ours, theirs in pairs)


def tabulate_training(cpu: Results) -> str:
    """Return the table of the ways to train, with the machine and the task above it."""
    turns, task = read_turns(cpu), cpu["training"]["task"]
    head = [
        "way",
        "tokens/s",
        "× TRL",
        "of the limit",
        "peak memory",
        "× TRL, no checkpointing",
        "start",
        "loss before",
        "loss after",
    ]
    rows = []
    for name, figures in turns.items():
        speeds = [speed(one) for one in figures]
        rows.append(
            [
                name,
                f"{median(speeds):,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f})",
                f"{compare(turns, speed, name, _TRL):.2f}",
                f"{median(map(share_of_limit, figures)):.0%}" if figures[0].flops else "",
                f"{median(map(peak_gib, figures)):.2f} GiB",
                f"{compare(turns, peak_gib, name, _TRL_ALL):.2f}",
                f"{median(one.start_s for one in figures):.1f} s",
                f"{median(one.loss_before for one in figures):.4f}",
                f"{median(one.loss_after or 0.0 for one in figures):.4f}",
            ]
        )
    limit = median(value for one in turns[_OURS] for value in one.product_flops_per_s)
    return (
        f"{describe_machine(cpu)}. Medians over {len(turns[_OURS])} turn(s) of {task['num_steps']} steps, batch "
        f"{task['batch_size']}, at most {task['max_length']} tokens, LoRA r={task['lora_rank']} "
        f"α={task['lora_alpha']}; the matrix products ran at {limit / 1e9:,.0f} GFLOP/s.\n\n"
        f"{table(head, rows)}\n\n![tokens per second and peak memory](performance.svg)"
    )


def tabulate_levers(cpu: Results) -> str:
    """Return the table of what is lost where one lever is left out."""
    turns = read_turns(cpu, "levers")
    rows = [
        [
            name,
            f"{compare(turns, speed, name, 'default'):.2f}",
            f"{compare(turns, peak_gib, name, 'default'):.2f}",
        ]
        for name in turns
        if name != "default"
    ]
    return table(["without", "× tokens/s", "× peak memory"], rows)


def describe_machine(cpu: Results) -> str:
    machine = cpu["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['processor']}, {machine['cpus']} CPUs; Python {machine['python']}, {versions}"


@dataclass(frozen=True)
class Goal:
    """One row of the goals: how it is measured from a part's results, shown, and met."""

    what: str
    part: str
    measure: Callable[[Results], float]
    show: str
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, value: float) -> bool:
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most

    def row(self, cpu: Results) -> list[str]:
        sign, limit = ("≥", self.at_least) if self.at_least is not None else ("≤", self.at_most)
        value = self.measure(cpu)
        if math.isnan(value):
            return [self.what, "needs two CPUs", f"{sign} {self.show.format(limit)}", ""]
        verdict = "met" if self.is_met(value) else "**missed**"
        return [self.what, self.show.format(value), f"{sign} {self.show.format(limit)}", verdict]


def _plan_error(cpu: Results) -> float:
    ours = read_turns(cpu)[_OURS]
    return max(abs(one.planned_bytes / one.peak_bytes - 1) for one in ours)


def _start_cost(cpu: Results) -> float:
    start = cpu["start-up"]
    return median(start["tunesmith"]) - median(start["empty"])


def _save_cost(cpu: Results) -> float:
    step_s, saved_step_s = (cpu["checkpoints"][name] for name in ("step_s", "saved_step_s"))
    cost_s = median(saved - plain for saved, plain in zip(saved_step_s, step_s, strict=True))
    return cost_s / (_SAVE_STEPS * median(step_s))


def _token_ratio(part: Results) -> float:
    speeds = part["tokens_per_s"]
    return median(speeds["tokenize and pack"]) / median(speeds["datasets.map"])


def _scaling(cpu: Results) -> float:
    speeds = cpu["workers"]
    return median(speeds["2"]) / (2 * median(speeds["1"])) if speeds["2"] else float("nan")


GOALS = [
    Goal(
        "training, tokens/s beside TRL's default",
        "training",
        lambda cpu: compare(read_turns(cpu), speed, _OURS, _TRL),
        "{:.2f} ×",
        at_least=3.0,
    ),
    Goal(
        "share of the matrix-product limit",
        "training",
        lambda cpu: median(map(share_of_limit, read_turns(cpu)[_OURS])),
        "{:.0%}",
        at_least=0.55,
    ),
    Goal(
        "peak memory beside TRL without checkpointing",
        "training",
        lambda cpu: compare(read_turns(cpu), peak_gib, _OURS, _TRL_ALL),
        "{:.2f} ×",
        at_most=0.45,
    ),
    Goal("`tunesmith plan` beside the measured peak", "training", _plan_error, "{:.0%} off", at_most=0.15),
    Goal("start beside an empty TorchTrainer's", "start-up", _start_cost, "{:+.1f} s", at_most=3.0),
    Goal(f"checkpoint every {_SAVE_STEPS} steps", "checkpoints", _save_cost, "{:.1%}", at_most=0.02),
    Goal(
        "tokenize and pack beside `datasets.map`",
        "tokens",
        lambda cpu: _token_ratio(cpu["tokens"]),
        "{:.2f} ×",
        at_least=1.0,
    ),
    Goal(
        "conversations, beside `datasets.map` with their chat template",
        "conversations",
        lambda cpu: _token_ratio(cpu["conversations"]),
        "{:.2f} ×",
        at_least=1.0,
    ),
    Goal("packs full", "tokens", lambda cpu: float(cpu["tokens"]["full"]), "{:.1%}", at_least=0.98),
    Goal("two workers, of twice one's tokens/s", "workers", _scaling, "{:.0%}", at_least=0.9),
]


def tabulate_goals(cpu: Results) -> str:
    """Return the table of the goals whose parts were measured."""
    rows = [goal.row(cpu) for goal in GOALS if goal.part in cpu]
    return table(["what", "measured", "goal", ""], rows)


def tabulate_large_data(cpu: Results) -> str:
    """Return the table of a growing data set's cost and memory."""
    rows = [
        [
            f"{one['rows']:,}",
            f"{one['file_bytes'] / 2**20:,.0f} MiB",
            f"{one['seconds']:.1f} s",
            f"{1e6 * one['seconds'] / one['rows']:.1f} µs",
            f"{one['peak_bytes'] / 2**20:,.0f} MiB",
            f"{(one['peak_bytes'] - one['imports_bytes']) / 2**20:,.0f} MiB",
            f"{one['child_peak_bytes'] / 2**20:,.0f} MiB",
        ]
        for one in cpu["large-data"]
    ]
    head = ["rows", "file", "time", "a row", "peak memory", "above imports", "a tokenizing process"]
    return table(head, rows)


def tabulate_roofline(counted: Results) -> str:
    """Return the table of what each change to a step that is counted for a GPU gives."""
    (_, *first), *others = [
        (one["name"], one["plain"]["ms"], one["compiled"]["ms"]) for one in counted["levers"]
    ]
    rows = [["as it is", *(f"{ms:.0f}" for ms in first)]]
    for name, *changed in others:
        pairs = zip(changed, first, strict=True)
        rows.append([name, *(f"{ms:.0f} ({ms - before:+.0f})".replace("-", "−") for ms, before in pairs)])
    head = ["with", "ms", "ms, blocks compiled"]
    return f"{counted['last_line']}. Rates: {counted['rates']}.\n\n{table(head, rows)}"


def draw(turns: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """Write the bars of speed and memory as an SVG; the same figures give the same file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = list(reversed(turns))
    colours = ["#D55E00" if name == _OURS else "#0072B2" for name in names]
    panels = {"tokens per second": speed, "peak memory, GiB": peak_gib}
    style = {"svg.hashsalt": "tunesmith", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 0.8 + 0.45 * len(names)), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, (title, measure) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            values = [median(map(measure, turns[name])) for name in names]
            bars = axes.barh(names, values, color=colours)
            axes.bar_label(
                bars, [f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in values], padding=3
            )
            axes.set_title(title, fontsize=11)
            axes.margins(x=0.15)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    write()
