"""Is the tuned model better? One sentence, from the scores' intervals."""

from __future__ import annotations

from collections.abc import Mapping

from tunesmith.evaluate.results import (
    MetricScores,
    Outcome,
    TrainedOn,
    Verdict,
    format_gain,
    format_gain_interval,
    format_interval,
    format_score,
)

# What counts most comes first: a right call or number, then meaning, then wording.
_PRIORITY = ("tool_calls", "numeric_match", "bertscore", "rougeL", "chrf", "exact_match")
# Six differences of one sign are the fewest that a sign test calls significant at 5 %: 2 / 2⁶ = 0.03.
_FEWEST_SAMPLES = 6


def judge(
    metrics: Mapping[str, MetricScores], trained_on: TrainedOn | None = None, num_samples: int = 0
) -> Verdict:
    """Return whether the tuned model is better, by the first metric of tool_calls, numeric_match, … that is there.

    It is better or worse only where the 95 % interval of the paired difference excludes 0 and there are
    at least six different samples. What it was trained on of the `num_samples` asked is told.
    """
    name = rank_metrics(metrics)[0]
    scores = metrics[name]
    outcome = outcome_of(scores)
    others = {other["label"]: outcome_of(other) for other in metrics.values() if other is not scores}
    text = _describe(scores, outcome) + _contradict(outcome, others) + "." + _warn(trained_on, num_samples)
    return Verdict(metric=name, outcome=outcome, text=text)


def rank_metrics(metrics: Mapping[str, MetricScores]) -> list[str]:
    """Return the names of the metrics, the one that decides first; those that apply to few samples come last."""
    most = max(scores["num_samples"] for scores in metrics.values())
    return sorted(metrics, key=lambda name: (2 * metrics[name]["num_samples"] < most, _PRIORITY.index(name)))


def outcome_of(scores: MetricScores) -> Outcome:
    """Return what one metric by itself says of tuned against base."""
    difference = scores["difference"]
    if difference is None:
        return "alone"
    if scores["num_different"] < _FEWEST_SAMPLES or difference["low"] <= 0 <= difference["high"]:
        return "unclear"
    return "better" if difference["low"] > 0 else "worse"


def _describe(scores: MetricScores, outcome: Outcome) -> str:
    label, scale, tuned = scores["label"], scores["scale"], scores["tuned"]
    num_samples, num_different = scores["num_samples"], scores["num_different"]
    count = f"{num_samples:,} sample" + ("s" if num_samples > 1 else "")
    if num_different < num_samples:
        count += f" ({num_different:,} different)"
    base, difference = scores["base"], scores["difference"]
    if base is None or difference is None:
        return (
            f"The tuned model's {label} on {count} is {format_score(tuned['mean'], scale)} "
            f"(95 % interval {format_interval(tuned, scale)}); no base model was compared"
        )
    if num_different < _FEWEST_SAMPLES:
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


def _warn(trained_on: TrainedOn | None, num_samples: int) -> str:
    """Return a sentence on the samples that the run was trained on."""
    if trained_on is None or not (trained_on["rows"] or trained_on["prompts"]):
        return ""
    parts = []
    if number := trained_on["rows"]:
        parts.append(f"{number:,} of the {num_samples:,} samples {_be(number)} trained on")
    if number := trained_on["prompts"]:
        prompts = "the prompt" if number == 1 else "the prompts"
        of_what = "more" if parts else f"of the {num_samples:,} samples"
        parts.append(f"{prompts} of {number:,} {of_what} {_be(number)} trained on with another answer")
    return f" {', and '.join(parts)}: what they score may be remembered, not learned."


def _be(number: int) -> str:
    return "was" if number == 1 else "were"
