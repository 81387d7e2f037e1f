"""The verdict: what decides it, when it is left open, and what it says."""

from __future__ import annotations

import pytest

from tunesmith.evaluate.results import MetricScores, Scale
from tunesmith.evaluate.verdict import judge


def metric(
    low: float, high: float, label: str = "a metric", scale: Scale = "fraction", num_samples: int = 64
) -> MetricScores:
    middle = (low + high) / 2
    return MetricScores(
        label=label,
        scale=scale,
        details="",
        num_samples=num_samples,
        num_different=num_samples,
        base={"mean": 0.25, "low": 0.2, "high": 0.3},
        tuned={"mean": 0.25 + middle, "low": 0.2 + middle, "high": 0.3 + middle},
        difference={"mean": middle, "low": low, "high": high},
    )


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.2, "unclear"), (0.0, 0.2, "unclear")],
)
def test_only_an_interval_without_0_decides(low: float, high: float, outcome: str) -> None:
    verdict = judge({"chrf": metric(low, high)})
    assert verdict["outcome"] == outcome
    assert (outcome in verdict["text"]) == (outcome != "unclear")


def test_the_sentence_has_the_numbers() -> None:
    assert judge({"rougeL": metric(0.1, 0.2, "ROUGE-L F1", num_samples=1024)})["text"] == (
        "The tuned model is better on 1,024 samples: ROUGE-L F1 0.400 against the base model's 0.250, "
        "a difference of +0.150 (95 % interval +0.100 to +0.200)."
    )
    assert judge({"numeric_match": metric(-0.0625, 0.125, "numeric match", "share")})["text"] == (
        "No clear difference on 64 samples: numeric match 28.1 % against the base model's 25.0 %, "
        "a difference of +3.1 pp (95 % interval −6.2 to +12.5 pp)."
    )


def test_right_answers_count_before_meaning_and_meaning_before_wording() -> None:
    metrics = {
        name: metric(0.1, 0.2) for name in ("exact_match", "chrf", "rougeL", "bertscore", "numeric_match")
    }
    for expected in ("numeric_match", "bertscore", "rougeL", "chrf", "exact_match"):
        assert judge(metrics)["metric"] == expected
        del metrics[expected]


def test_metrics_that_say_something_else_are_named() -> None:
    worse, unclear = metric(-0.2, -0.1, "chrF"), metric(-0.1, 0.1, "BERTScore F1")
    better = metric(0.1, 0.2, "ROUGE-L F1")
    text = judge({"rougeL": better, "chrf": worse, "exact_match": unclear})["text"]
    assert text.endswith("; yet chrF is clearly worse.")
    exact = metric(0.1, 0.2, "exact match")
    text = judge({"bertscore": unclear, "rougeL": better, "exact_match": exact, "chrf": worse})["text"]
    assert text.endswith("; yet ROUGE-L F1 and exact match are clearly better, chrF is clearly worse.")
    assert "yet" not in judge({"rougeL": better, "chrf": metric(0.1, 0.2), "exact_match": unclear})["text"]


def test_a_handful_of_samples_decides_nothing() -> None:
    assert judge({"chrf": metric(1.0, 1.0, num_samples=5)})["outcome"] == "unclear"
    assert judge({"chrf": metric(1.0, 1.0, num_samples=6)})["outcome"] == "better"
    assert judge({"chrf": metric(1.0, 1.0, num_samples=1)})["text"].startswith(
        "1 sample is too few to tell: "
    )


def test_without_a_base_there_is_only_the_score() -> None:
    alone = metric(0.1, 0.2, "chrF") | {"base": None, "difference": None}
    verdict = judge({"chrf": alone})  # type: ignore[dict-item]
    assert verdict["outcome"] == "alone"
    assert verdict["text"] == (
        "The tuned model's chrF on 64 samples is 0.400 (95 % interval 0.350 to 0.450); no base model was compared."
    )
