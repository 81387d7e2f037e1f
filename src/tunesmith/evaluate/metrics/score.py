"""The metrics: which of them can be had for a test set, and every sample's scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from tunesmith.config.tuned import METRICS
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.evaluate.intervals import Interval, bootstrap_interval, paired_difference
from tunesmith.evaluate.metrics.bertscore import find_bertscore
from tunesmith.evaluate.metrics.calls import match_calls, parse_calls
from tunesmith.evaluate.metrics.numbers import find_marked, is_numeric, match_numbers, reference_number
from tunesmith.evaluate.results import IntervalRecord, MetricScores, Prediction, Scale

_LIMITS: dict[Scale, float] = {"fraction": 1.0, "points": 100.0, "share": 1.0}

Score = Callable[[Sequence[str], Sequence[str]], list[float | None]]


@dataclass(frozen=True)
class Metric:
    """A metric that can be had: `score(predictions, references)` gives every sample's score, on `scale`.

    A score is None where the metric doesn't apply to the sample, which its reference alone decides. `label`
    is for people; `details` says by which library and with which settings.
    """

    name: str
    label: str
    scale: Scale
    details: str
    score: Score


def choose_metrics(
    asked: Sequence[str] | None, references: Sequence[str], bertscore_model: str | None, device: str
) -> tuple[list[Metric], dict[str, str]]:
    """Return the metrics to compute, and for each one left out, why and how to get it.

    `references` are those of the samples that will be asked. `asked` None takes all that apply to them and can be had;
    `numeric_match` and `tool_calls` are missed only where they apply. An encoder given as `bertscore_model` asks for BERTScore. `device` is where it will run.

    Raises:
        ConfigError: a metric that was asked for doesn't apply to any reference.
        ModelError: BERTScore was asked for and its encoder can't be had.
    """
    chosen, left_out = [], {}
    applies = {"numeric_match": _are_numeric, "tool_calls": _hold_calls}
    expected = [name for name in METRICS if name not in applies or applies[name](references)]
    for name in expected if asked is None else [name for name in METRICS if name in asked]:
        try:
            chosen.append(_make_metric(name, references, bertscore_model, device))
        except TunesmithError as error:
            if asked is not None or (name == "bertscore" and bertscore_model is not None):
                raise
            left_out[name] = error.message if error.hint is None else f"{error.message}; {error.hint}"
    return chosen, left_out


def _make_metric(name: str, references: Sequence[str], bertscore_model: str | None, device: str) -> Metric:
    match name:
        case "bertscore":
            bertscore = find_bertscore(bertscore_model, device)
            return Metric(name, "BERTScore F1", "fraction", bertscore.describe(), bertscore.score)
        case "rougeL":
            return _make_rouge(references)
        case "chrf":
            return _make_chrf()
        case "exact_match":
            details = "equal but for white space at the ends"
            return Metric(name, "exact match", "share", details, _match_exactly)
        case "numeric_match":
            return _make_numeric_match(references)
        case "tool_calls":
            return _make_tool_calls(references)
    raise ValueError(name)


def _make_rouge(references: Sequence[str]) -> Metric:
    from rouge_score.rouge_scorer import RougeScorer

    # Its tokenizer keeps nothing else: texts in other scripts would all score 0.
    if 2 * sum(bool(re.search("[a-z0-9]", text.lower())) for text in references) < len(references):
        raise ConfigError(
            "ROUGE-L knows the letters a to z and digits only, and most references have none",
            "take chrf, which knows every script",
        )
    scorer = RougeScorer(["rougeL"])

    def score(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
        pairs = zip(references, predictions, strict=True)
        return [float(scorer.score(reference, text)["rougeL"].fmeasure) for reference, text in pairs]

    details = f"longest common subsequence of words, in lower case, not stemmed; rouge-score {version('rouge-score')}"
    return Metric("rougeL", "ROUGE-L F1", "fraction", details, score)


def _make_chrf() -> Metric:
    from sacrebleu.metrics import CHRF

    scorer = CHRF()

    def score(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
        pairs = zip(predictions, references, strict=True)
        return [scorer.sentence_score(text, [reference]).score for text, reference in pairs]

    details = f"characters in sequences of up to 6, each sample by itself; sacrebleu {version('sacrebleu')}"
    return Metric("chrf", "chrF", "points", details, score)


def _make_numeric_match(references: Sequence[str]) -> Metric:
    if all(reference_number(reference) is None for reference in references):
        raise ConfigError(
            "`numeric_match` compares numbers, and no reference comes to one",
            "it applies to references such as 72, `The answer is 72.` and GSM8K's `#### 72`",
        )
    # Where the answers are numbers, a year in one that isn't is none. A person who asks has any text's last one.
    are_numeric = _are_numeric(references)

    def score(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
        applies = [is_numeric(reference) or not are_numeric for reference in references]
        scores = match_numbers(predictions, references)
        return [value if applied else None for value, applied in zip(scores, applies, strict=True)]

    details = (
        "equal numbers: after ####, an answer's first and a reference's last; else in the last \\boxed{}, else the last"
        + ("" if are_numeric else " of the text, which few of these references are about")
    )
    return Metric("numeric_match", "numeric match", "share", details, score)


def _are_numeric(references: Sequence[str]) -> bool:
    """Tell whether numbers are what is asked for: some are marked as the answer, or half of the references are one."""
    if any(find_marked(reference) is not None for reference in references):
        return True
    return 2 * sum(map(is_numeric, references)) >= len(references) > 0


def _make_tool_calls(references: Sequence[str]) -> Metric:
    if not _hold_calls(references):
        raise ConfigError(
            "`tool_calls` compares calls of tools, and no reference holds one",
            "it applies to conversations whose last answer has `tool_calls`",
        )

    def score(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
        return [match_calls(*pair) for pair in zip(predictions, references, strict=True)]

    details = (
        "the same calls by name and arguments, in any order, and no others; where the reference calls a tool"
    )
    return Metric("tool_calls", "tool calls", "share", details, score)


def _hold_calls(references: Sequence[str]) -> bool:
    return any(parse_calls(reference) for reference in references)


def _match_exactly(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
    pairs = zip(predictions, references, strict=True)
    return [float(text.strip() == reference.strip()) for text, reference in pairs]


def score_predictions(rows: Sequence[Prediction], metrics: Sequence[Metric]) -> list[Prediction]:
    """Return the rows with `scores` filled in, and `base_scores` where there are base predictions."""
    references = [row["reference"] for row in rows]
    scored = [row.copy() for row in rows]
    _fill(scored, [row["prediction"] for row in rows], references, metrics, "scores")
    base = [row["base_prediction"] for row in rows if row["base_prediction"] is not None]
    assert len(base) in (0, len(rows)), "the base model answers all samples or none"
    _fill(scored[: len(base)], base, references[: len(base)], metrics, "base_scores")
    return scored


def score_anew(
    rows: Sequence[Prediction], names: Sequence[str], bertscore_model: str | None, device: str
) -> list[Prediction]:
    """Do what `score_predictions` does in a process that has no metrics yet: these, computed on `device`."""
    references = [row["reference"] for row in rows]
    metrics, _ = choose_metrics(names, references, bertscore_model, device)
    return score_predictions(rows, metrics)


def _fill(
    rows: Sequence[Prediction],
    predictions: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[Metric],
    key: Literal["scores", "base_scores"],
) -> None:
    columns = {metric.name: metric.score(predictions, references) for metric in metrics}
    for i, row in enumerate(rows):
        row[key] = {name: column[i] for name, column in columns.items()}


def summarise(rows: Sequence[Prediction], metrics: Sequence[Metric], seed: int) -> dict[str, MetricScores]:
    """Return each metric's mean and 95 % interval over scored rows: tuned, base, and tuned − base."""
    return {metric.name: _summarise_metric(rows, metric, seed) for metric in metrics}


def _summarise_metric(rows: Sequence[Prediction], metric: Metric, seed: int) -> MetricScores:
    scored = [row for row in rows if row["scores"][metric.name] is not None]
    tuned = [value for row in scored if (value := row["scores"][metric.name]) is not None]
    base = [value for row in scored if (value := (row["base_scores"] or {}).get(metric.name)) is not None]
    groups = [row["group"] for row in scored]
    ends = (0.0, 1.0) if metric.scale == "share" else None
    limit = _LIMITS[metric.scale]
    difference = None
    if base:
        found = paired_difference(tuned, base, seed, groups, None if ends is None else (-1.0, 1.0))
        difference = _record(found, -limit, limit)
    return MetricScores(
        label=metric.label,
        scale=metric.scale,
        details=metric.details,
        num_samples=len(tuned),
        num_different=len(set(groups)),
        base=_summarise_mean(base, seed, groups, ends, limit) if base else None,
        tuned=_summarise_mean(tuned, seed, groups, ends, limit),
        difference=difference,
    )


def _summarise_mean(
    values: Sequence[float],
    seed: int,
    groups: Sequence[int],
    ends: tuple[float, float] | None,
    limit: float,
) -> IntervalRecord:
    # BERTScore may fall below 0, and is then shown so.
    return _record(bootstrap_interval(values, seed, groups=groups, ends=ends), min(0.0, *values), limit)


def _record(interval: Interval, lowest: float, highest: float) -> IntervalRecord:
    """Return an interval without what no score can be."""
    return IntervalRecord(mean=interval.mean, low=max(lowest, interval.low), high=min(highest, interval.high))
