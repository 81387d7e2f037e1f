"""How long the examples are: the bins of a histogram, and the figures beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_NUM_BARS = 32


@dataclass(frozen=True)
class Bin:
    """How many examples have more than `low` and at most `high` tokens."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Bar(Bin):
    """A bin as it is drawn; `height` in percent of the highest one's."""

    height: float


def bin_lengths(lengths: np.ndarray, reach: int, number: int) -> list[Bin]:
    """Return at most `number` bins of about the same width from 0 to `reach` tokens."""
    edges = np.unique(np.linspace(0, reach, min(number, reach) + 1).astype(int))
    # Bins are (low, high], so that the longest examples share one with their like.
    counts = np.diff(np.searchsorted(np.sort(lengths), edges, "right"))
    return [Bin(*map(int, it)) for it in zip(edges, edges[1:], counts, strict=False)]


def draw_lengths(lengths: np.ndarray, max_seq_length: int) -> list[Bar]:
    """Return the bars from nothing to `max_seq_length` or, if all are far shorter, to the longest example."""
    longest = int(lengths.max(initial=1))
    reach = max(longest, max_seq_length if max_seq_length <= 2 * longest else 0)
    bins = bin_lengths(lengths, reach, _NUM_BARS)
    highest = max(it.count for it in bins)
    return [Bar(it.low, it.high, it.count, round(100 * it.count / highest, 2)) for it in bins]


def describe_lengths(lengths: np.ndarray) -> list[tuple[str, str]]:
    """Return the figures of the lengths, each with its label."""
    low, middle, high = np.quantile(lengths, [0.0, 0.5, 0.95])
    return [
        ("shortest", f"{low:,.0f}"),
        ("median", f"{middle:,.0f}"),
        ("mean", f"{lengths.mean():,.1f}"),
        ("95 % are at most", f"{high:,.0f}"),
        ("longest", f"{lengths.max():,}"),
    ]
