"""A curve smoothed, and drawn in characters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

BLOCKS = " ▁▂▃▄▅▆▇█"


def smooth(values: Sequence[float] | np.ndarray, share: float = 0.08) -> np.ndarray:
    """Return the centred moving average [N] over `share` of the points, taken twice.

    The window narrows towards the first point, so that the steep start of a loss curve keeps its
    height. Values that are not finite have no weight.
    """
    smoothed = np.asarray(values, dtype=np.float64)
    reach = int(len(smoothed) * share / 2)
    if reach == 0:
        return smoothed
    index = np.arange(len(smoothed))
    before = np.minimum(index, reach)
    first, end = index - before, np.minimum(index + before + 1, len(smoothed))
    for _ in range(2):
        finite = np.isfinite(smoothed)
        sums = np.concatenate([[0.0], np.cumsum(np.where(finite, smoothed, 0.0))])
        counts = np.concatenate([[0], np.cumsum(finite)])
        num_finite = counts[end] - counts[first]
        mean = (sums[end] - sums[first]) / np.maximum(num_finite, 1)
        smoothed = np.where(num_finite > 0, mean, np.nan)
    return smoothed


def draw_bars(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """Return `height` lines of block characters, at most `width` wide, top line first.

    More values than `width` are averaged; the lowest value is an eighth of a line high, the highest
    fills all lines, and a gap stands for values that are not finite.
    """
    columns = _average_into(np.asarray(values, dtype=np.float64), width)
    finite = np.isfinite(columns)
    if not finite.any():
        return [""] * height
    low, high = columns[finite].min(), columns[finite].max()
    top = 8 * height
    scale = (top - 1) / (high - low) if high > low else 0.0
    middle = 1.0 if high > low else top / 2
    eighths = np.where(finite, np.rint(middle + (np.where(finite, columns, low) - low) * scale), 0).astype(
        int
    )
    lines = []
    for row in range(height - 1, -1, -1):
        filled = np.clip(eighths - 8 * row, 0, 8)
        lines.append("".join(BLOCKS[level] for level in filled))
    return lines


def _average_into(values: np.ndarray, width: int) -> np.ndarray:
    if len(values) <= width:
        return values
    borders = np.linspace(0, len(values), width + 1).astype(int)
    parts = [values[first:end] for first, end in pairwise(borders.tolist())]
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])
