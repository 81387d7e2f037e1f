"""Is the tuned model better? One sentence, from the scores' intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tunesmith.evaluate.results import (
    MetricScores,
    Outcome,
    Verdict,
    format_gain,
    format_gain_interval,
    format_interval,
    format_score,
)

# What counts most comes first: a right answer, then meaning, then wording.
_PRIORITY = ("numeric_match", "bertscore", "rougeL", "chrf", "exact_match")
# Six differences of one sign are the fewest that a sign test calls significant at 5 %: 2 / 2⁶ = 0.03.
_FEWEST_SAMPLES = 6


def judge(metrics: Mapping[str, MetricScores]) -> Verdict:
    """Return whether the tuned model is better, by the first metric of numeric_match, bertscore, … that is there.

    It is better or worse only where the 95 % interval of the paired difference excludes 0 and there are
    at least six samples.
    """
    name = rank_metrics(metrics)[0]
    scores = metrics[name]
    outcome = outcome_of(scores)
    others = {other["label"]: outcome_of(other) for other in metrics.values() if other is not scores}
    text = _describe(scores, outcome) + _contradict(outcome, others)
    return Verdict(metric=name, outcome=outcome, text=text + ".")


def rank_metrics(metrics: Iterable[str]) -> list[str]:
    """Return the names of the metrics, the one that decides first."""
    return sorted(metrics, key=_PRIORITY.index)


def outcome_of(scores: MetricScores) -> Outcome:
    """Return what one metric by itself says of tuned against base."""
    difference = scores["difference"]
    if difference is None:
        return "alone"
    if scores["num_samples"] < _FEWEST_SAMPLES or difference["low"] <= 0 <= difference["high"]:
        return "unclear"
    return "better" if difference["low"] > 0 else "worse"


def _describe(scores: MetricScores, outcome: Outcome) -> str:
    label, scale, tuned = scores["label"], scores["scale"], scores["tuned"]
    num_samples = scores["num_samples"]
    count = f"{num_samples:,} sample" + ("s" if num_samples > 1 else "")
    base, difference = scores["base"], scores["difference"]
    if base is None or difference is None:
        return (
            f"The tuned model's {label} on {count} is {format_score(tuned['mean'], scale)} "
            f"(95 % interval {format_interval(tuned, scale)}); no base model was compared"
        )
    if num_samples < _FEWEST_SAMPLES:
        beginning = f"{count} {'are' if num_samples > 1 else 'is'} too few to tell"
    elif outcome == "unclear":
        beginning = f"No clear difference on {count}"
    else:
        beginning = f"The tuned model is {outcome} on {count}"
    return (
        f"{beginning}: {label} {format_score(tuned['mean'], scale)} against the base model's "
        f"{format_score(base['mean'], scale)}, a difference of {format_gain(difference['mean'], scale)} "
        f"(95 % interval {format_gain_interval(difference, scale)})"
    )


def _contradict(outcome: Outcome, others: Mapping[str, Outcome]) -> str:
    """Return the end of the sentence: the metrics, by label, that clearly say something else."""
    parts = []
    for clear in ("better", "worse"):
        labels = [label for label, said in others.items() if said == clear != outcome]
        if labels:
            *first, last = labels
            names = f"{', '.join(first)} and {last} are" if first else f"{last} is"
            parts.append(f"{names} clearly {clear}")
    return f"; yet {', '.join(parts)}" if parts else ""
