"""Which set each row goes to: by a seeded hash, so that equal rows, and those of a group, share a side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.config import HFDatasetConfig
from tunesmith.config.data import OwnSet, Part

SETS = ("training", "validation", "test")
LEFT_OUT = len(SETS)


@dataclass(frozen=True)
class Written:
    """The rows that were written of a data set.

    Attributes:
        hashes: uint64, of what each holds.
        groups: uint64: rows of one number stay on one side; where nothing groups them, the hashes.
        is_taken: whether each counts; None where all do.
        notes: what the log says of it.
    """

    hashes: np.ndarray
    groups: np.ndarray
    is_taken: np.ndarray | None
    notes: list[str]


def choose_sides(
    written: Sequence[Written], data_sets: Sequence[HFDatasetConfig], own_sets: Sequence[OwnSet]
) -> np.ndarray:
    """Return for each row that was written the number of its set in `SETS`, uint8, or `LEFT_OUT`.

    A row that several data sets have is held out of all if it is out of one, and its group with it. What would be split off for a part
    that one of `own_sets` stands in place of trains.
    """
    sides = np.concatenate(
        [
            _choose_own_sides(it, settings, {own.part for own in own_sets if own.number in (number, None)})
            for number, (it, settings) in enumerate(zip(written, data_sets, strict=True))
        ]
    )
    if len(written) == 1:
        return sides
    counts = sides != LEFT_OUT
    groups = np.concatenate([it.groups for it in written])[counts]
    hashes = np.concatenate([it.hashes for it in written])[counts]
    joined = [np.unique(groups, return_inverse=True)[1]]
    if not np.array_equal(groups, hashes):
        joined.append(np.unique(hashes, return_inverse=True)[1])
    moved = True
    # A row takes its group with it, whose other rows take theirs.
    while moved:
        before = sides[counts]
        for same in joined:
            furthest = np.zeros(len(same), dtype=np.uint8)
            np.maximum.at(furthest, same, sides[counts])
            sides[counts] = furthest[same]
        moved = len(joined) > 1 and not np.array_equal(sides[counts], before)
    return sides


def _choose_own_sides(written: Written, settings: HFDatasetConfig, replaced: set[Part]) -> np.ndarray:
    """Return the sides of a data set's rows, as if it were alone."""
    groups, is_taken = written.groups, written.is_taken
    bounds = _cut(np.sort(groups if is_taken is None else groups[is_taken]), settings)
    sides = np.add(*((groups >= bound).astype(np.uint8) for bound in bounds))
    for part in replaced:
        sides[sides == SETS.index(part)] = 0
    if is_taken is not None:
        sides[~is_taken] = LEFT_OUT
    return sides


def count_overlap(written: Sequence[Written], sides: np.ndarray, of_sides: Sequence[int]) -> dict[str, int]:
    """Return how many rows of each of these sets are in the training set too."""
    if not of_sides:
        return {}
    hashes = np.concatenate([it.hashes for it in written])
    trained = np.unique(hashes[sides == 0])
    return {SETS[side]: int(np.isin(hashes[sides == side], trained).sum()) for side in of_sides}


def _cut(ordered: np.ndarray, settings: HFDatasetConfig) -> tuple[int, int]:
    """Return the hashes at which the validation and the test set begin.

    Cuts lie between distinct hashes, as near to the asked shares as those allow. Some row always trains;
    with a ratio below 1 and two distinct rows, some row is held out, for validation first.
    """
    num_rows, beyond = len(ordered), 1 << 64
    if settings.train_split_ratio == 1.0 or ordered[0] == ordered[-1]:
        return beyond, beyond
    first_group = int(np.searchsorted(ordered, ordered[0], "right"))
    last_group = int(np.searchsorted(ordered, ordered[-1], "left"))
    num_train = _nearest_border(
        ordered, round(num_rows * settings.train_split_ratio), first_group, last_group
    )
    num_test = round((num_rows - num_train) * settings.val_test_split_ratio)
    at_least = num_train
    if settings.val_test_split_ratio < 1.0:
        at_least = int(np.searchsorted(ordered, ordered[num_train], "right"))
    num_before_test = _nearest_border(ordered, num_rows - num_test, at_least, num_rows)
    test_from = beyond if num_before_test == num_rows else int(ordered[num_before_test])
    return int(ordered[num_train]), test_from


def _nearest_border(ordered: np.ndarray, target: int, lowest: int, highest: int) -> int:
    """Return the index nearest to `target`, within the bounds, at which a new hash begins."""
    target = min(max(target, lowest), highest)
    if target == len(ordered):
        return target
    below = int(np.searchsorted(ordered, ordered[target], "left"))
    above = int(np.searchsorted(ordered, ordered[target], "right"))
    nearest = below if target - below <= above - target else above
    return min(max(nearest, lowest), highest)
