"""The number that an answer comes to: which one it is, what it is worth, and when numbers are asked for at all."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tunesmith.evaluate.metrics.numbers import is_numeric, reference_number
from tunesmith.evaluate.metrics.score import choose_metrics


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("First 3, then 4: it comes to 7 apples.", 7),
        ("$1,234.50", 1234.5),
        ("1.234,56 €", 1234.56),
        ("1.234.567", 1234567),
        ("1 234 kg", 1234),
        ("12\u202f345", 12345),
        ("1'234", 1234),
        ("3,5", 3.5),
        (".5", 0.5),
        ("25 %", 25),
        ("3 km/h", 3),
        ("The answer is -5", -5),
        ("−7", -7),
        ("-$5", -5),
        ("$-5$", -5),
        ("10 - 5", 5),
        ("10-5", 5),
        ("between 3–5", 5),
        ("The total – 5", 5),
        ("- 5 apples", 5),
        ("3/4", 0.75),
        (r"\frac{1}{4}", 0.25),
        (r"so \boxed{1,024}, of 2,000", 1024),
        (r"\boxed{\frac{3}{4}} of 5", 0.75),
        ("1.5e3", 1500),
        ("It is 1e-2.", 0.01),
        ("**72**", 72),
        ("__72__", 72),
        ("boxed{72} of 80", 72),
        (r"$1{,}024$", 1024),
        (r"$50\%$", 50),
        ("GPT-4", 4),
        ("H2O and A1", None),
        ("none", None),
        ("", None),
        ("1/0", None),
        ("9" * 5000, None),
        ("#### 72 apples", None),
        ("5 of them\n#### 72", 72),
        ("#### Steps\n1. Add.\n\nIt comes to 72.", 72),
    ],
)
def test_a_text_comes_to_its_marked_number_or_its_last(text: str, number: float | None) -> None:
    found = reference_number(text)
    assert found == (None if number is None else Fraction(str(number)))


@pytest.mark.parametrize(
    "text",
    [
        "72",
        "$1,234.50",
        "25 %",
        "-3 km/h",
        "x = 5",
        "72 apples",
        "The answer is 72.",
        r"so \boxed{3/4}",
        "**72**",
        r"$50\%$",
        r"$1{,}024$",
    ],
)
def test_a_number_with_its_unit_is_numeric(text: str) -> None:
    assert is_numeric(text)


@pytest.mark.parametrize(
    "text",
    [
        "In 1969 he landed on it.",
        "1. Paris",
        "2024-05-01",
        "12:30",
        "Paris has 2 airports",
        "v2",
        "",
        "yes",
        "1/0",
    ],
)
def test_prose_with_a_number_in_it_is_not(text: str) -> None:
    assert not is_numeric(text)


def chosen(references: list[str], asked: list[str] | None = None) -> dict[str, list[float | None]]:
    answers = ["It is 72.", "Seventy, no: 71.", "It was in 1969."][: len(references)]
    metrics, _ = choose_metrics(asked, references, None, "cpu")
    return {metric.name: metric.score(answers, references) for metric in metrics}


def test_numbers_are_compared_by_themselves_where_the_answers_are_numbers() -> None:
    assert chosen(["72", "72", "The flight of 1969."])["numeric_match"] == [1, 0, None]
    assert "numeric_match" not in chosen(["72", "He came in 1971.", "The flight of 1969."])
    assert "numeric_match" not in chosen(["Paris", "London", "Rome"])


def test_who_asks_for_numbers_has_any_texts_last_one() -> None:
    found = chosen(["There were 72.", "No number", "The flight of 1969."], ["numeric_match"])
    assert found["numeric_match"] == [1, None, 1]


def test_an_answer_is_read_to_its_own_marker_or_box_where_it_has_one() -> None:
    metrics, _ = choose_metrics(["numeric_match"], ["72"], None, "cpu")
    right = ["#### 72\nQuestion: 5 and 6?", r"\boxed{72} and not 71", "#### 1. Add\nIt is 72."]
    answers = [*right, "72, or rather 71", "71", "no"]
    assert metrics[0].score(answers, ["72"] * 6) == [1, 1, 1, 0, 0, 0]
