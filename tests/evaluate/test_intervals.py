"""Intervals: their coverage with few samples and many, their agreement with a plain loop, copies, and their edges."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from statistics import NormalDist

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
    # Student's 2.028 for 36 degrees of freedom, where a normal distribution has 1.960.
    tail = NormalDist().cdf(-2.028 * math.sqrt(37 / 36))
    expected = np.quantile(means, [tail, 1 - tail])
    assert [interval.low, interval.high] == pytest.approx(
        expected, abs=0.02 * float(np.ptp(expected)) + 0.005
    )
    assert interval.mean == pytest.approx(float(values.mean()))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.5, 0.9, 0.3] * 4
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values * 9, seed=1) != bootstrap_interval(values * 9, seed=2)


def test_a_higher_level_is_wider() -> None:
    values = np.random.default_rng(5).normal(size=50).tolist()
    narrow, wide = bootstrap_interval(values, 0, level=0.5), bootstrap_interval(values, 0, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


# Values whose true mean is 0, by what they are.
DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "right and wrong": lambda generator, size: generator.choice([-1.0, 0.0, 1.0], size),
    "mostly equal": lambda generator, size: generator.choice([-1.0, 0.0, 1.0], size, p=[0.1, 0.8, 0.1]),
    "hardly equal": lambda generator, size: generator.choice([-1.0, 0.0, 1.0], size, p=[0.45, 0.1, 0.45]),
    "normal": lambda generator, size: generator.normal(0, 0.1, size),
    "even": lambda generator, size: generator.uniform(-1, 1, size),
    "skewed": lambda generator, size: generator.gamma(2, size=size) - 2,
}


@pytest.mark.parametrize("num_samples", [6, 9])
@pytest.mark.parametrize("kind", DRAWS)
def test_of_six_to_nine_samples_no_more_than_5_in_100_verdicts_are_false(kind: str, num_samples: int) -> None:
    generator = np.random.default_rng(num_samples)
    covered, num_cases = 0, 1000
    for case in range(num_cases):
        interval = bootstrap_interval(DRAWS[kind](generator, num_samples).tolist(), seed=case)
        covered += interval.low <= 0 <= interval.high
    assert covered / num_cases >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / num_cases)


@pytest.mark.parametrize("num_samples", [6, 7, 8, 9])
def test_right_and_wrong_answers_keep_their_level_whatever_their_true_shares(num_samples: int) -> None:
    """Exact: the sum over all outcomes, of which there are few."""
    for gained, lost in (
        (0.0, 0.05),
        (0.5, 0.5),
        (0.4, 0.4),
        (0.1, 0.1),
        (0.3, 0.0),
        (0.9, 0.05),
        (0.35, 0.65),
    ):
        covered = 0.0
        for ups in range(num_samples + 1):
            for downs in range(num_samples + 1 - ups):
                same = num_samples - ups - downs
                ways = math.comb(num_samples, ups) * math.comb(num_samples - ups, downs)
                chance = ways * gained**ups * lost**downs * max(0.0, 1 - gained - lost) ** same
                tuned = [1.0] * ups + [0.0] * (downs + same)
                base = [0.0] * ups + [1.0] * downs + [0.0] * same
                found = paired_difference(tuned, base, seed=0, ends=(-1, 1))
                covered += chance * (found.low - 1e-9 <= gained - lost <= found.high + 1e-9)
        assert covered >= (0.96 if gained == lost else 0.93), (gained, lost)


def test_six_right_answers_of_six_are_no_proof_of_a_seventh() -> None:
    share = bootstrap_interval([1.0] * 6, seed=0, ends=(0, 1))
    assert share.mean == share.high == 1 and share.low == pytest.approx(0.58, abs=0.01)
    gain = paired_difference([1.0] * 6, [0.0] * 6, seed=0, ends=(-1, 1))
    assert 0.1 < gain.low < 0.2 and gain.high == 1
    nearly = paired_difference([1.0] * 5 + [0.0], [0.0] * 5 + [1.0], seed=0, ends=(-1, 1))
    assert nearly.low < 0


@pytest.mark.parametrize("num_samples", [10, 20])
def test_of_ten_and_more_hardly_more_than_5_in_100_verdicts_are_false(num_samples: int) -> None:
    generator = np.random.default_rng(num_samples)
    num_cases = 600
    for kind in ("right and wrong", "normal"):
        covered = 0
        for case in range(num_cases):
            values = DRAWS[kind](generator, num_samples).tolist()
            found = bootstrap_interval(values, seed=case, num_resamples=1000)
            covered += found.low <= 0 <= found.high
        assert covered / num_cases >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / num_cases)


def test_copies_are_one_sample() -> None:
    """Three rows, each written 20 times, tell no more than the three."""
    tuned, base = [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for ends in (None, (-1, 1)):
        once = paired_difference(tuned, base, seed=0, ends=ends)
        copied = paired_difference(tuned * 20, base * 20, seed=0, groups=[1, 2, 3] * 20, ends=ends)
        assert [copied.mean, copied.low, copied.high] == pytest.approx([once.mean, once.low, once.high])
        assert copied.low < 0 < copied.high
    values = np.random.default_rng(7).normal(size=40)
    alone = bootstrap_interval(values.tolist(), seed=3)
    five_times = bootstrap_interval(
        np.repeat(values, 5).tolist(), seed=3, groups=np.repeat(range(40), 5).tolist()
    )
    assert [five_times.low, five_times.high] == pytest.approx([alone.low, alone.high])
    believed = bootstrap_interval(np.repeat(values, 5).tolist(), seed=3)
    assert believed.high - believed.low < 0.5 * (alone.high - alone.low), "what copies would feign"


def test_groups_of_unequal_sizes_cover_the_mean_over_samples() -> None:
    generator = np.random.default_rng(8)
    covered, num_cases = 0, 500
    for case in range(num_cases):
        sizes = generator.integers(1, 6, 40)
        values = np.repeat(generator.normal(size=40), sizes)
        found = bootstrap_interval(values.tolist(), case, 1000, groups=np.repeat(range(40), sizes).tolist())
        covered += found.low <= 0 <= found.high
    assert covered / num_cases == pytest.approx(0.95, abs=0.03)


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
