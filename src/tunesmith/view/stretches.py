"""What of a long example is shown: its stretches of trained and of other tokens, each shortened in its middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

_SHORTEST_SHOWN = 8
# To hide less than this saves nothing and costs the reader a gap.
_FEWEST_HIDDEN = 24


class Stretch(NamedTuple):
    """The tokens `start` to `stop`, either all trained or none; those from `hidden_from` to `hidden_to` aren't shown."""

    start: int
    stop: int
    is_trained: bool
    hidden_from: int
    hidden_to: int


def cut_stretches(trained: np.ndarray, allowance: int) -> Iterator[Stretch]:
    """Yield the stretches of an example, bool [T], of which about `allowance` tokens are shown.

    Borders are what one looks for, so every stretch shows both its ends, as long as there is room for any of it.
    """
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    limit = max(_SHORTEST_SHOWN, fill_evenly([stop - start for start, stop in pairwise(borders)], allowance))
    for start, stop in pairwise(borders):
        shown = min(stop - start, limit, max(allowance, 0))
        if stop - start - shown < _FEWEST_HIDDEN:
            shown = stop - start
        allowance -= shown
        head = (shown + 1) // 2
        is_whole = shown == stop - start
        yield Stretch(
            start,
            stop,
            bool(trained[start]),
            stop if is_whole else start + head,
            stop if is_whole else stop - (shown - head),
        )


def fill_evenly(sizes: Sequence[int], budget: int) -> int:
    """Return the largest limit for which the sizes, none above it, add up to the budget at most."""
    left, limit = budget, 0
    ordered = sorted(sizes)
    for index, size in enumerate(ordered):
        limit = left // (len(ordered) - index)
        if size > limit:
            return limit
        left -= size
    return ordered[-1] if ordered else 0
