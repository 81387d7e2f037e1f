"""Bootstrap intervals: their coverage, their agreement with a plain loop, and their edges."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from tunesmith.evaluate.intervals import bootstrap_interval, paired_difference


def test_the_interval_covers_a_known_difference_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(0)
    true_difference, num_cases, covered = 0.1, 400, 0
    for case in range(num_cases):
        hardness = generator.normal(0, 1, 60)
        base = hardness + generator.exponential(0.3, 60)
        tuned = hardness + generator.exponential(0.3, 60) + true_difference
        difference = paired_difference(tuned.tolist(), base.tolist(), seed=case)
        covered += difference.low <= true_difference <= difference.high
    # Three standard errors of such a count around 95 %.
    assert covered / num_cases == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / num_cases))


def test_pairing_is_what_makes_the_interval_narrow() -> None:
    generator = np.random.default_rng(1)
    hardness = generator.normal(0, 1, 100)
    tuned, base = hardness + 0.1, hardness + generator.normal(0, 0.05, 100)
    paired = paired_difference(tuned.tolist(), base.tolist(), seed=0)
    alone = bootstrap_interval(tuned.tolist(), seed=0)
    assert paired.mean == pytest.approx(float(np.mean(tuned - base)))
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)
    assert paired.low > 0


def test_the_interval_is_that_of_a_plain_loop() -> None:
    values = np.random.default_rng(2).gamma(2, size=37)
    generator = np.random.default_rng(3)
    means = [generator.choice(values, size=len(values)).mean() for _ in range(20_000)]
    interval = bootstrap_interval(values.tolist(), seed=4)
    expected = np.quantile(means, [0.025, 0.975])
    assert [interval.low, interval.high] == pytest.approx(
        expected, abs=0.02 * float(np.ptp(expected)) + 0.005
    )
    assert interval.mean == pytest.approx(float(values.mean()))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.5, 0.9, 0.3]
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values * 9, seed=1) != bootstrap_interval(values * 9, seed=2)


def test_a_higher_level_is_wider() -> None:
    values = np.random.default_rng(5).normal(size=50).tolist()
    narrow, wide = bootstrap_interval(values, 0, level=0.5), bootstrap_interval(values, 0, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("values", [[0.25], [0.25] * 7])
def test_equal_values_have_an_interval_without_width(values: list[float]) -> None:
    interval = bootstrap_interval(values, seed=0)
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_memory_does_not_grow_with_the_samples() -> None:
    values = np.random.default_rng(6).normal(size=200_000).tolist()
    tracemalloc.start()
    bootstrap_interval(values, seed=0, num_resamples=50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # All resamples at once would be 50 × 200,000 × 16 bytes = 160 MB.
    assert peak < 30e6
