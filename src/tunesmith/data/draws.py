"""What dropout follows from: the seed, the step, a row's own number, and a token's place in it.

So a row drops the same whatever it is batched with, and whichever worker runs it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# SplitMix64: what it counts by, and its finalizer.
_STRIDE = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step."""

    seed: int
    step: int

    def token_keys(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return a key for each token, int32, from the numbers of their rows and their places in these.

        A row that a step has twice, as weights of data sets may ask for, has the same keys both times.
        """
        (key,) = np.random.SeedSequence([self.seed, self.step]).generate_state(1, np.uint64)
        return as_keys(mix(mix(key, rows), places))

    def seed_for(self, rows: np.ndarray) -> int:
        """Return torch's seed for what runs these rows at once, and isn't drawn by token."""
        # Their number too: to a sequence of seeds zeros at its end are nothing.
        entropy = [self.seed, self.step, len(rows), *rows.tolist()]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def mix(keys: np.ndarray | np.uint64, numbers: np.ndarray) -> np.ndarray:
    """Return, as uint64, what follows from each key and number, and looks random."""
    words = keys + (numbers.astype(np.uint64) + np.uint64(1)) * _STRIDE
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        words = (words ^ (words >> shift)) * factor
    return np.asarray(words ^ (words >> _SHIFTS[-1]))


def as_keys(words: np.ndarray) -> np.ndarray:
    """Return the lower half of each word, as int32."""
    return np.asarray(words.astype(np.uint32).view(np.int32))
