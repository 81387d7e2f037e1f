"""The scores of an evaluation, as the table printed at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tunesmith.evaluate.endings import describe_endings
from tunesmith.evaluate.results import (
    MetricScores,
    Scores,
    ThroughputRecord,
    format_gain,
    format_gain_interval,
    format_interval,
    format_score,
)
from tunesmith.evaluate.verdict import outcome_of, rank_metrics
from tunesmith.view.units import format_duration

_LABEL_WIDTH = 12
_STYLES = {"better": "bold green", "worse": "bold red", "unclear": "bold yellow", "alone": "bold"}


def format_scores(scores: Scores) -> RenderableType:
    """Return the verdict, the table of metrics and losses, the throughput, and what was left out and why."""
    verdict = scores["verdict"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("base", "tuned", "difference", "95 % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in rank_metrics(scores["metrics"]):
        table.add_row(*_metric_row(scores["metrics"][name]))
    for row in list_losses(scores):
        table.add_row(*row, "")
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True, width=_LABEL_WIDTH)
    lines.add_column(overflow="fold")
    for label, text in _lines(scores):
        lines.add_row(label, Text(text))
    return Group(Text(verdict["text"], style=_STYLES[verdict["outcome"]]), table, lines)


def _metric_row(metric: MetricScores) -> tuple[str | Text, ...]:
    label, scale, tuned = metric["label"], metric["scale"], metric["tuned"]
    base, difference = metric["base"], metric["difference"]
    if base is None or difference is None:
        return label, "–", format_score(tuned["mean"], scale), "–", format_interval(tuned, scale)
    return (
        label,
        format_score(base["mean"], scale),
        format_score(tuned["mean"], scale),
        Text(format_gain(difference["mean"], scale), style=_STYLES[outcome_of(metric)]),
        format_gain_interval(difference, scale),
    )


def list_losses(scores: Scores) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, base, tuned, difference) of the validation loss, in nats per trained token, and its perplexity."""
    loss = scores["loss"]
    if loss is None:
        return
    for name, measure, digits in (("validation loss", float, 4), ("perplexity", _perplexity, 2)):
        tuned = measure(loss["tuned"])
        base = difference = "–"
        if loss["base"] is not None:
            base = f"{measure(loss['base']):,.{digits}f}"
            difference = f"{tuned - measure(loss['base']):+,.{digits}f}".replace("-", "−")
        yield name, base, f"{tuned:,.{digits}f}", difference


def _perplexity(loss: float) -> float:
    # The exponential of more is too large for a float.
    return math.exp(loss) if loss < 709 else math.inf


def _lines(scores: Scores) -> Iterator[tuple[str, str]]:
    engine, done = scores["engine"], scores["throughput"]
    for variant, text in describe_endings(scores):
        yield f"{variant} model", text
    yield "samples", describe_samples(scores)
    if scores["rows_left_out"]:
        yield "left out", describe_left_out(scores)
    replicas = f", {engine['num_replicas']} replicas" if engine["num_replicas"] > 1 else ""
    yield "engine", f"{engine['name']} {engine['version']}, {engine['dtype']}{replicas}"
    yield "throughput", format_throughput(done)
    for name, why in scores["left_out"].items():
        yield name, f"left out: {why}"


def describe_samples(scores: Scores) -> str:
    """Return how many samples were asked, how many of them are different, and what of them was trained on."""
    text = f"{scores['num_samples']:,}"
    if scores["num_different"] < scores["num_samples"]:
        text += f", {scores['num_different']:,} different: those that ask the same count as one in intervals"
    if scores["first_rows"] is not None:
        text += f", of the first {scores['first_rows']:,} rows (--max_samples)"
    trained = scores["trained_on"]
    if trained is None:
        text += "; no training set is known to compare them with"
    elif trained["rows"] or trained["prompts"]:
        text += f"; {trained['rows']:,} trained on"
        if trained["prompts"]:
            text += f", {trained['prompts']:,} more with another answer"
    return text


def describe_left_out(scores: Scores) -> str:
    """Return how many rows weren't asked, by reason."""
    reasons = scores["rows_left_out"]
    total = sum(reasons.values())
    listed = ", ".join(f"{number:,} with {reason}" for reason, number in reasons.items())
    return f"{total:,} row{'s' if total > 1 else ''}: {listed}"


def format_throughput(done: ThroughputRecord) -> str:
    """Return what was generated, in how long, and how fast."""
    amount = f"{done['samples']:,} answers, {done['tokens']:,} tokens in {format_duration(done['seconds'])}"
    if done["seconds"] <= 0:
        return amount
    tokens_per_second, samples_per_second = (done[what] / done["seconds"] for what in ("tokens", "samples"))
    return f"{tokens_per_second:,.0f} tokens/s, {samples_per_second:,.2f} samples/s: {amount}"
