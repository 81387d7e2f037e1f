"""The metrics: which of them can be had for a test set, and every sample's scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.metadata import version
from typing import Literal

from tunesmith.config.tuned import METRICS
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.evaluate.intervals import Interval, bootstrap_interval, paired_difference
from tunesmith.evaluate.metrics.bertscore import find_bertscore
from tunesmith.evaluate.results import IntervalRecord, MetricScores, Prediction, Scale

# A number with its sign, a currency sign and commas between thousands: 72, -1,234.50, -$5. It ends where no
# further digit, decimal or denominator follows.
_NUMBER = r"(?P<prefix>[+\-−$€£ ]*)(?P<digits>\d[\d,]*(?:\.\d+)?|\.\d+)(?!\.?\d|\s*/)"
_MARKER = "####"
_AFTER_MARKER = re.compile(rf"\s*{_NUMBER}")
_ENDS_IN_NUMBER = re.compile(rf"\s*{_NUMBER}\s*\.?\s*")

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

    `asked` None takes all that apply to the references and can be had; `numeric_match` is missed only
    where it applies. An encoder given as `bertscore_model` asks for BERTScore. `device` is where it will run.

    Raises:
        ConfigError: a metric that was asked for doesn't apply to any reference.
        ModelError: BERTScore was asked for and its encoder can't be had.
    """
    chosen, left_out = [], {}
    expected = [name for name in METRICS if name != "numeric_match" or _have_numbers(references)]
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
    if not _have_numbers(references):
        raise ConfigError(
            "`numeric_match` compares answers that end in `#### 72`, and no reference does",
            "it applies to test sets such as GSM8K",
        )
    details = "equal numbers after ####, an answer's first and a reference's last"
    return Metric("numeric_match", "numeric match", "share", details, _match_numbers)


def _have_numbers(references: Sequence[str]) -> bool:
    return any(_reference_number(reference) is not None for reference in references)


def _match_exactly(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
    pairs = zip(predictions, references, strict=True)
    return [float(text.strip() == reference.strip()) for text, reference in pairs]


def _match_numbers(predictions: Sequence[str], references: Sequence[str]) -> list[float | None]:
    scores: list[float | None] = []
    for text, reference in zip(predictions, references, strict=True):
        number = _reference_number(reference)
        scores.append(None if number is None else float(_predicted_number(text) == number))
    return scores


def _reference_number(text: str) -> Decimal | None:
    _, marker, answer = text.rpartition(_MARKER)
    return _to_number(_ENDS_IN_NUMBER.fullmatch(answer)) if marker else None


def _predicted_number(text: str) -> Decimal | None:
    # The first: a model that runs on asks and answers questions of its own. What follows the number doesn't
    # count against it: "#### 72 dollars" says 72.
    _, marker, answer = text.partition(_MARKER)
    return _to_number(_AFTER_MARKER.match(answer)) if marker else None


def _to_number(match: re.Match[str] | None) -> Decimal | None:
    if match is None:
        return None
    number = Decimal(match["digits"].replace(",", ""))
    return -number if {"-", "−"} & set(match["prefix"]) else number


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
    tuned = [value for row in rows if (value := row["scores"][metric.name]) is not None]
    base = [value for row in rows if (value := (row["base_scores"] or {}).get(metric.name)) is not None]
    return MetricScores(
        label=metric.label,
        scale=metric.scale,
        details=metric.details,
        num_samples=len(tuned),
        base=_record(bootstrap_interval(base, seed)) if base else None,
        tuned=_record(bootstrap_interval(tuned, seed)),
        difference=_record(paired_difference(tuned, base, seed)) if base else None,
    )


def _record(interval: Interval) -> IntervalRecord:
    return IntervalRecord(mean=interval.mean, low=interval.low, high=interval.high)
