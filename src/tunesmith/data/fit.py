"""What becomes of examples that are longer than a sequence, and how much of them is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tunesmith.config import TrainConfig
from tunesmith.data.align import Span
from tunesmith.data.examples import Example, Segment
from tunesmith.data.formats import Findings, RowFormat
from tunesmith.data.formats.text import TextFormat
from tunesmith.errors import ConfigError

LongWay = Literal["truncate", "drop", "split", "keep"]


@dataclass
class Counts:
    """What became of the rows: examples cut at the right, and rows or examples dropped.

    Of the `dropped`, the `untrained` had nothing to train whatever their length, the `over_long` were dropped
    because they were to be, and of the others the prompts alone fill a sequence. `lost_tokens` are those that were
    cut off or dropped for their length, `lost_answers` the trained stretches of which nothing is left. `split` texts
    became `windows`. `findings` are what else the rows' owner should know.
    """

    truncated: int = 0
    dropped: int = 0
    untrained: int = 0
    over_long: int = 0
    lost_tokens: int = 0
    lost_answers: int = 0
    split: int = 0
    windows: int = 0
    findings: Findings = field(default_factory=Findings)

    def __iadd__(self, other: Counts) -> Counts:
        for name, number in vars(other).items():
            setattr(self, name, getattr(self, name) + number)
        return self


@dataclass(frozen=True)
class Limits:
    """The longest sequence, in tokens, and what becomes of longer examples: a way for each data set.

    truncate: cut at the right; drop: left out; split: in windows; keep: left whole, for who cuts them later.
    """

    max_seq_length: int
    ways: Sequence[LongWay]


def choose_limits(config: TrainConfig, formats: Sequence[RowFormat]) -> Limits:
    """Return how long the examples of these data sets may be.

    Raises:
        ConfigError: they are to be concatenated, and can't be cut.
    """
    if config.concatenate and formats[0].num_segments > 1:
        raise ConfigError(
            f"`concatenate` cuts examples, and those of {formats[0].name} are several segments that belong together",
            "set concatenate false",
        )
    of_text: LongWay = "keep" if config.concatenate and config.long_text == "split" else config.long_text
    ways = [of_text if isinstance(it, TextFormat) else config.long_examples for it in formats]
    return Limits(config.max_seq_length, ways)


def fit(example: Example, limits: Limits, counts: Counts) -> list[Segment]:
    """Return what is left of an example within the limits: its segments, each cut to its last trained token.

    Of a text that is split the windows, each an example; of an example that is dropped none.
    """
    fitted: list[Segment] = []
    for segment in example.segments:
        ids, spans = segment
        if not spans:
            counts.dropped += 1
            counts.untrained += 1
            return []
        end = spans[-1][1]
        if end > limits.max_seq_length:
            return _fit_long(example, limits, counts)
        fitted.append(segment if end == len(ids) else Segment(ids[:end], spans))
    return fitted


def _fit_long(example: Example, limits: Limits, counts: Counts) -> list[Segment]:
    """Return what is left of an example of which the trained tokens go beyond the limit."""
    limit, way = limits.max_seq_length, limits.ways[example.dataset_id]
    segments = example.segments
    if not all(spans for _, spans in segments):
        counts.dropped += 1
        counts.untrained += 1
        return []
    if way == "keep":
        return [_cut(segment, segment.spans[-1][1]) for segment in segments]
    if way == "split":
        windows = [window for segment in segments for window in _split(segment, limit)]
        counts.split += 1
        counts.windows += len(windows)
        return windows
    fills = any(spans[0][0] >= limit for _, spans in segments)
    kept = [] if fills or way == "drop" else [_cut(segment, limit) for segment in segments]
    counts.truncated += bool(kept)
    counts.dropped += not kept
    counts.over_long += not kept and not fills
    counts.lost_tokens += sum(spans[-1][1] for _, spans in segments) - sum(len(ids) for ids, _ in kept)
    counts.lost_answers += sum(_count_answers(spans, limit if kept else 0) for _, spans in segments)
    return kept


def _cut(segment: Segment, limit: int) -> Segment:
    """Return the segment to its last trained token within the limit."""
    ids, spans = segment
    spans = [(begin, min(stop, limit)) for begin, stop in spans if begin < limit]
    return Segment(ids[: spans[-1][1]], spans)


def _split(segment: Segment, limit: int) -> list[Segment]:
    """Return windows of at most `limit` tokens, in which every trained token is trained once.

    A window begins with the last token of the one before it, because a first token can't be trained: nothing
    precedes it that could predict it.
    """
    ids, spans = segment
    end = spans[-1][1]
    windows: list[Segment] = []
    for start in range(0, end - 1, limit - 1):
        stop = min(start + limit, end)
        inside = [
            (max(begin - start, 1), min(until, stop) - start)
            for begin, until in spans
            if begin < stop and until > start + 1
        ]
        if inside:
            windows.append(Segment(ids[start:stop], inside))
    return windows


def _count_answers(spans: Sequence[Span], beyond: int) -> int:
    """Return how many trained stretches begin there or later; an answer and the end token behind it are one."""
    ends = [-1, *(stop for _, stop in spans)]
    return sum(begin >= beyond and begin != end for (begin, _), end in zip(spans, ends, strict=False))
