"""Bootstrap intervals of a mean over samples, alone or of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Bounds the memory of the resamples, whatever the number of samples: 8 MiB of indices, 8 MiB of values.
_DRAWS_AT_ONCE = 2**20


@dataclass(frozen=True)
class Interval:
    """The mean over samples and its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], seed: int, num_resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Return the percentile bootstrap interval of the mean over samples (Efron 1979).

    It covers the true mean in a share of `level` of all cases when there are some tens of samples, and in
    fewer when there are less. Of a single sample, or of equal ones, it is as narrow as a point: such
    values tell nothing of their spread.
    """
    assert len(values), "the mean of nothing has no interval"
    values_N = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means_R = np.empty(num_resamples)
    resamples_at_once = max(1, _DRAWS_AT_ONCE // len(values_N))
    for first in range(0, num_resamples, resamples_at_once):
        part = means_R[first : first + resamples_at_once]
        part[:] = values_N[generator.integers(len(values_N), size=(len(part), len(values_N)))].mean(axis=1)
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values_N.mean()), float(low), float(high))


def paired_difference(tuned: Sequence[float], base: Sequence[float], seed: int) -> Interval:
    """Return the interval of the mean of tuned − base, sample by sample.

    Both models answer the same samples: what makes a sample hard or easy for both cancels.
    """
    return bootstrap_interval(np.subtract(tuned, base).tolist(), seed)
