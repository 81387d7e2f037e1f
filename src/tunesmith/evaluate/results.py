"""What an evaluation leaves behind: the formats of `scores.json` and `predictions.jsonl`."""

from __future__ import annotations

from typing import Literal, TypedDict

# fraction: 0 to 1. points: 0 to 100. share: 0 to 1, of the samples, shown in per cent.
Scale = Literal["fraction", "points", "share"]
Outcome = Literal["better", "worse", "unclear", "alone"]
# row: the very row was trained on. prompt: its prompt was, with another answer.
Trained = Literal["row", "prompt"]

RULES = 2
"""The rules by which answers are compared and intervals drawn; scores of other rules don't compare with these.

1 compared reasoning and tool calls as text, and took copies for samples of their own.
"""


class Prediction(TypedDict):
    """A line of `predictions.jsonl`; `base_…` are None where the tuned model was evaluated alone.

    A score is None where the metric doesn't apply to the sample. `input` is the prompt as the model saw it; what was
    compared is without the reasoning, which stands by itself: "" where there is none. `reasoning_ended` is False for
    an answer that is reasoning to its end. `group` is the first sample that asks the same. `trained` says what of the
    sample the run was trained on, None where it wasn't or no run is known.
    """

    id: int
    group: int
    trained: Trained | None
    input: str
    reference: str
    reference_reasoning: str
    prediction: str
    reasoning: str
    reasoning_ended: bool
    base_prediction: str | None
    base_reasoning: str | None
    base_reasoning_ended: bool | None
    scores: dict[str, float | None]
    base_scores: dict[str, float | None] | None
    finish_reason: str
    base_finish_reason: str | None
    num_prompt_tokens: int
    num_tokens: int
    base_num_tokens: int | None


class IntervalRecord(TypedDict):
    """A mean over samples and its 95 % interval, on the metric's own scale."""

    mean: float
    low: float
    high: float


class MetricScores(TypedDict):
    """A metric over the samples it applies to; `difference` is tuned − base, paired by sample.

    `num_different` of the samples ask something different: what decides how wide the intervals are.
    """

    label: str
    scale: Scale
    details: str
    num_samples: int
    num_different: int
    base: IntervalRecord | None
    tuned: IntervalRecord
    difference: IntervalRecord | None


class Verdict(TypedDict):
    """Whether the tuned model is better, by its primary metric; `alone` where there is no base."""

    metric: str
    outcome: Outcome
    text: str


class EngineRecord(TypedDict):
    name: str
    version: str
    dtype: str
    num_replicas: int


class GenerationRecord(TypedDict):
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    seed: int


class LossRecord(TypedDict):
    """Validation losses, in nats per trained token."""

    base: float | None
    tuned: float


class ThroughputRecord(TypedDict):
    """What was generated, for tuned and base together: they may share an engine and its batches."""

    samples: int
    tokens: int
    seconds: float


class Endings(TypedDict):
    """How the answers of one model ended.

    `cut` counts those cut off for their length, `cut_early` those of them that had less than max_tokens, `unended` those that never left their reasoning, `empty` others
    without a text. `whole` has each metric's mean over the `num_whole` answers that are none of these.
    """

    answers: int
    cut: int
    cut_early: int
    unended: int
    empty: int
    num_whole: int
    whole: dict[str, float]


class TrainedOn(TypedDict):
    """How many of the samples the run was trained on: as they are, and their prompts with another answer."""

    rows: int
    prompts: int


class Scores(TypedDict):
    """`scores.json`; None for what no run recorded. `finish` counts finish reasons of tuned, and of base if it ran.

    `num_different` of the samples ask something different. `rows_left_out` counts rows that weren't asked, by reason;
    `first_rows` is how many were read where the test set has more. `trained_on` is None where no training set is known.
    """

    format_version: int
    rules: int
    run: str | None
    checkpoint: str | None
    step: int | None
    why: str
    kind: str
    base: str | None
    tuned: str
    test_set: str
    num_samples: int
    num_different: int
    num_skipped: int
    first_rows: int | None
    rows_left_out: dict[str, int]
    trained_on: TrainedOn | None
    engine: EngineRecord
    generation: GenerationRecord
    loss: LossRecord | None
    metrics: dict[str, MetricScores]
    left_out: dict[str, str]
    throughput: ThroughputRecord
    finish: dict[str, dict[str, int]]
    endings: dict[str, Endings]
    verdict: Verdict


def format_score(value: float, scale: Scale) -> str:
    """Return a mean score as people read it: 0.312, 31.2 or 31.2 %."""
    return f"{_number(value, scale)}{' %' if scale == 'share' else ''}"


def format_gain(value: float, scale: Scale) -> str:
    """Return a difference of scores with its sign; that of two shares is in percentage points."""
    return f"{_number(value, scale, '+')}{' pp' if scale == 'share' else ''}"


def format_interval(record: IntervalRecord, scale: Scale) -> str:
    """Return the ends of a score's interval."""
    return f"{_number(record['low'], scale)} to {format_score(record['high'], scale)}"


def format_gain_interval(record: IntervalRecord, scale: Scale) -> str:
    """Return the ends of a difference's interval, with their signs."""
    return f"{_number(record['low'], scale, '+')} to {format_gain(record['high'], scale)}"


def _number(value: float, scale: Scale, sign: str = "-") -> str:
    digits = 3 if scale == "fraction" else 1
    return f"{100 * value if scale == 'share' else value:{sign}z.{digits}f}".replace("-", "−")
