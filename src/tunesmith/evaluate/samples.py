"""The samples on the report page: which ones, in which order, and how each is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.evaluate.results import MetricScores, Prediction, Scale, format_gain, format_score

# At each end; a page of thousands of answers is slow to open and nobody reads it.
SAMPLES_SHOWN = 100
_LONG_TEXT_CHARS = 700
_LONG_TEXT_LINES = 14


@dataclass(frozen=True)
class Text:
    """A text, of which a long one shows its `head` until the `rest` is asked for."""

    head: str
    rest: str = ""


@dataclass(frozen=True)
class Answer:
    """What one of the models said, its scores as (label, value), and why and where it ended.

    `reasoning` is None where there is none; not `ended`: it was never left.
    """

    model: str
    text: Text
    reasoning: Text | None
    ended: bool
    scores: tuple[tuple[str, str], ...]
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Sample:
    """A sample as shown; `gain` is in words, and None where the primary metric doesn't apply.

    `notes` say what the sample shares with others and with the training set.
    """

    id: int
    notes: tuple[str, ...]
    gain: str | None
    outcome: str
    input: Text
    num_prompt_tokens: int
    reference: Text
    reference_reasoning: Text | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Tally:
    """How many samples gained, stayed equal and lost on the primary metric."""

    gained: int
    equal: int
    lost: int

    @property
    def total(self) -> int:
        return self.gained + self.equal + self.lost


def gain_of(row: Prediction, metric: str) -> float | None:
    """Return tuned − base of one sample, the tuned score where there is no base; None where it has no score."""
    tuned = row["scores"].get(metric)
    if row["base_scores"] is None or tuned is None:
        return tuned
    base = row["base_scores"][metric]
    return None if base is None else tuned - base


def tally_gains(rows: Sequence[Prediction], metric: str) -> Tally | None:
    """Return the count of samples that gained, stayed and lost; None where there is no base."""
    gains = [gain_of(row, metric) for row in rows if row["base_scores"] is not None]
    if not gains:
        return None
    signs = [(gain > 0) - (gain < 0) for gain in gains if gain is not None]
    return Tally(signs.count(1), signs.count(0), signs.count(-1))


def choose_samples(rows: Sequence[Prediction], metrics: Sequence[str]) -> list[Prediction]:
    """Return the rows by gain, the most gained first; of many, only the two ends.

    The first of the `metrics` decides, the others order what is equal by it. Rows without a gain come last.
    """
    ranked = [row for row in rows if gain_of(row, metrics[0]) is not None]
    ranked.sort(key=lambda row: [gain_of(row, metric) or 0.0 for metric in metrics], reverse=True)
    if len(ranked) > 2 * SAMPLES_SHOWN:
        return ranked[:SAMPLES_SHOWN] + ranked[-SAMPLES_SHOWN:]
    rest = [row for row in rows if gain_of(row, metrics[0]) is None]
    return (ranked + rest)[: 2 * SAMPLES_SHOWN]


def lay_out(row: Prediction, metrics: Mapping[str, MetricScores], primary: str) -> Sample:
    """Return the row as the page shows it."""
    tuned = Answer(
        "tuned",
        shorten(row["prediction"]),
        _fold(row["reasoning"]),
        row["reasoning_ended"],
        _label(row["scores"], metrics),
        row["num_tokens"],
        row["finish_reason"],
    )
    answers: tuple[Answer, ...] = (tuned,)
    if row["base_prediction"] is not None:
        base = Answer(
            "base",
            shorten(row["base_prediction"]),
            _fold(row["base_reasoning"]),
            row["base_reasoning_ended"] is not False,
            _label(row["base_scores"] or {}, metrics),
            row["base_num_tokens"] or 0,
            row["base_finish_reason"] or "",
        )
        answers = (base, tuned)
    gain = gain_of(row, primary)
    compared = row["base_scores"] is not None
    return Sample(
        id=row["id"],
        notes=tuple(_notes(row)),
        gain=None if gain is None else _describe_gain(gain, metrics[primary], compared),
        outcome=_outcome(gain) if compared else "alone",
        input=shorten(row["input"]),
        num_prompt_tokens=row["num_prompt_tokens"],
        reference=shorten(row["reference"]),
        reference_reasoning=_fold(row["reference_reasoning"]),
        answers=answers,
    )


_TRAINED = {"row": "trained on", "prompt": "prompt trained on, with another answer"}


def _notes(row: Prediction) -> Iterator[str]:
    if row["trained"] is not None:
        yield _TRAINED[row["trained"]]
    if row["group"] != row["id"]:
        yield f"asks what sample {row['group']} asks"


def _fold(reasoning: str | None) -> Text | None:
    """Return the reasoning as a text that is all `rest`, to be asked for; None if there is none."""
    return Text("", reasoning) if reasoning else None


def _outcome(gain: float | None) -> str:
    if not gain:
        return "unclear"
    return "better" if gain > 0 else "worse"


def _describe_gain(gain: float, metric: MetricScores, compared: bool) -> str:
    if not compared:
        return f"{metric['label']} {_value(gain, metric['scale'])}"
    if gain == 0:
        return "no change"
    if metric["scale"] == "share":
        return "now right" if gain > 0 else "now wrong"
    return format_gain(gain, metric["scale"])


def _label(
    scores: Mapping[str, float | None], metrics: Mapping[str, MetricScores]
) -> tuple[tuple[str, str], ...]:
    return tuple(
        (metrics[name]["label"], _value(value, metrics[name]["scale"]))
        for name, value in scores.items()
        if value is not None
    )


def _value(value: float, scale: Scale) -> str:
    # A share is of samples; a single one is right or wrong.
    return ("yes" if value else "no") if scale == "share" else format_score(value, scale)


def shorten(text: str) -> Text:
    """Cut a long text in two, behind a line or a word where there is one near."""
    lines = text.split("\n", _LONG_TEXT_LINES)
    by_lines = len(text) - len(lines[-1]) if len(lines) > _LONG_TEXT_LINES else len(text)
    limit = min(by_lines, _LONG_TEXT_CHARS)
    # A cut that hides only a little more costs a click and saves nothing.
    if len(text) <= 1.3 * limit:
        return Text(text)
    space = max(text.rfind("\n", limit // 2, limit), text.rfind(" ", limit // 2, limit))
    cut = space + 1 if space > 0 else limit
    return Text(text[:cut], text[cut:])
