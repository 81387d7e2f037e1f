"""`report.html`: an evaluation on one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.atomic_files import write_bytes
from tunesmith.evaluate.endings import describe_endings
from tunesmith.evaluate.intervals import FEW_GROUPS
from tunesmith.evaluate.results import (
    IntervalRecord,
    MetricScores,
    Prediction,
    Scores,
    format_gain,
    format_gain_interval,
    format_interval,
    format_score,
)
from tunesmith.evaluate.samples import SAMPLES_SHOWN, choose_samples, lay_out, tally_gains
from tunesmith.evaluate.table import (
    describe_left_out,
    describe_samples,
    format_throughput,
    list_losses,
)
from tunesmith.evaluate.verdict import outcome_of, rank_metrics
from tunesmith.view.page import embed_png, render_page

_HEADLINES = {
    "better": "Better than its base",
    "worse": "Worse than its base",
    "unclear": "No clear difference",
    "alone": "Not compared",
}
_KINDS = {
    "adapter": "LoRA adapter",
    "state": "checkpoint of a full fine-tuning",
    "model": "Hugging Face folder",
}
# The whisker of an interval: its drawing is this wide, with 0 in the middle, and a margin for the dot.
_WIDTH, _MARGIN = 200, 8


@dataclass(frozen=True)
class Whisker:
    """Where an interval lies on a drawing with 0 in the middle, in its units."""

    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class ScoreRow:
    """A line of the score table; each cell is (mean, interval), None without a base."""

    label: str
    details: str
    num_samples: int
    base: tuple[str, str] | None
    tuned: tuple[str, str]
    difference: tuple[str, str] | None
    whisker: Whisker | None
    outcome: str


def write_report(
    scores: Scores, predictions: Sequence[Prediction], loss_curve_png: bytes | None, path: Path
) -> None:
    """Write the page: whole, or not at all.

    What the models said is shown as text, never run; see `render_page`.
    """
    write_bytes(path, [_render(scores, predictions, loss_curve_png)])


def _render(scores: Scores, predictions: Sequence[Prediction], loss_curve_png: bytes | None) -> bytes:
    ranked = rank_metrics(scores["metrics"])
    primary = ranked[0]
    shown = choose_samples(predictions, ranked)
    return render_page(
        "tunesmith.evaluate",
        "report",
        headline=_HEADLINES[scores["verdict"]["outcome"]],
        scores=scores,
        primary=scores["metrics"][primary],
        rows=[_score_row(scores["metrics"][name]) for name in ranked],
        losses=list(list_losses(scores)),
        loss_curve=None if loss_curve_png is None else embed_png(loss_curve_png),
        endings=list(_ending_rows(scores, predictions)),
        facts=list(_facts(scores)),
        tally=tally_gains(predictions, primary),
        samples=[lay_out(row, scores["metrics"], primary) for row in shown],
        few_groups=FEW_GROUPS,
        num_hidden=len(predictions) - len(shown),
        samples_shown=SAMPLES_SHOWN,
    )


def _score_row(metric: MetricScores) -> ScoreRow:
    base, tuned, difference, scale = metric["base"], metric["tuned"], metric["difference"], metric["scale"]
    return ScoreRow(
        label=metric["label"],
        details=metric["details"],
        num_samples=metric["num_samples"],
        base=None if base is None else (format_score(base["mean"], scale), format_interval(base, scale)),
        tuned=(format_score(tuned["mean"], scale), format_interval(tuned, scale)),
        difference=None
        if difference is None
        else (format_gain(difference["mean"], scale), format_gain_interval(difference, scale)),
        whisker=None if difference is None else _place_whisker(difference),
        outcome=outcome_of(metric),
    )


def _place_whisker(difference: IntervalRecord) -> Whisker:
    reach = max(abs(difference["low"]), abs(difference["high"])) or 1.0
    low, mean, high = (
        round(_WIDTH / 2 + (_WIDTH / 2 - _MARGIN) * difference[end] / reach, 2)
        for end in ("low", "mean", "high")
    )
    return Whisker(low, mean, high)


@dataclass(frozen=True)
class EndingRow:
    """How many answers of a model ended how, the mean of their tokens, and what the bad ones cost, in words."""

    model: str
    stopped: int
    cut: int
    unended: int
    empty: int
    mean_tokens: str
    cost: str | None


def _ending_rows(scores: Scores, predictions: Sequence[Prediction]) -> Iterator[EndingRow]:
    lengths: dict[str, list[int | None]] = {
        "base": [row["base_num_tokens"] for row in predictions],
        "tuned": [row["num_tokens"] for row in predictions],
    }
    costs = dict(describe_endings(scores))
    for variant, endings in sorted(scores["endings"].items()):
        counts = [count for count in lengths[variant] if count is not None]
        yield EndingRow(
            variant,
            endings["answers"] - endings["cut"],
            endings["cut"],
            endings["unended"],
            endings["empty"],
            f"{sum(counts) / len(counts):,.1f}" if counts else "–",
            costs.get(variant),
        )


def _facts(scores: Scores) -> Iterator[tuple[str, str]]:
    engine, generation = scores["engine"], scores["generation"]
    yield "tuned model", f"{scores['tuned']} ({_KINDS.get(scores['kind'], scores['kind'])})"
    if scores["run"] is not None:
        yield "run", scores["run"]
    if scores["checkpoint"] is not None:
        yield "checkpoint", f"{scores['checkpoint']}: {scores['why']}"
    if scores["base"] is not None:
        yield "base model", scores["base"]
    yield "test set", scores["test_set"]
    yield "samples", describe_samples(scores)
    if scores["rows_left_out"]:
        yield "left out", describe_left_out(scores)
    replicas = f", {engine['num_replicas']} replicas" if engine["num_replicas"] > 1 else ""
    yield "engine", f"{engine['name']} {engine['version']}, {engine['dtype']}{replicas}"
    if generation["temperature"] == 0:
        yield "decoding", f"greedy, at most {generation['max_tokens']:,} tokens"
    else:
        yield (
            "decoding",
            f"temperature {generation['temperature']:g}, top_k {generation['top_k']}, top_p {generation['top_p']:g}, "
            f"at most {generation['max_tokens']:,} tokens",
        )
    yield "seed", f"{generation['seed']}"
    yield "throughput", format_throughput(scores["throughput"])
