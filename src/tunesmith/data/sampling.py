"""The first rows of a seeded shuffle, found as the rows come: their number isn't known before the last."""

from __future__ import annotations

import numpy as np

_BLOCK_ROWS = 4096
# The number of the random stream that rows are shuffled by: another than those of the split and the order.
_STREAM = 0x6D61785F726F7773


class FirstOfShuffle:
    """Which rows are the first `num_rows` (None: all) of a shuffle that follows from `seed`.

    Each row draws a number, and the lowest come first. Holds some 32 bytes for each row that is taken.
    """

    def __init__(self, num_rows: int | None, seed: int) -> None:
        self.num_seen = 0
        self._num_rows = num_rows
        self._random = np.random.PCG64([seed, _STREAM])
        self._block: list[int] = []
        self._admitted: list[np.ndarray] = []
        self._pending: list[int] = []
        self._lowest = np.empty(0, dtype=np.uint64)
        self._limit = 1 << 64

    def admits(self) -> bool:
        """Return whether the next row may be one of them, as far as the rows so far tell."""
        self.num_seen += 1
        if self._num_rows is None:
            return True
        if not self._block:
            self._block = self._random.random_raw(_BLOCK_ROWS).tolist()[::-1]
        drawn = self._block.pop()
        if drawn >= self._limit:
            return False
        self._pending.append(drawn)
        if len(self._pending) >= max(_BLOCK_ROWS, self._num_rows):
            self._lower_limit(self._num_rows)
        return True

    def chosen(self) -> np.ndarray | None:
        """Return for each row that was admitted whether it is one of them in the end, bool; None: all are."""
        if self._num_rows is None:
            return None
        self._lower_limit(self._num_rows)
        return np.concatenate(self._admitted) < np.uint64(self._limit) if self._limit < 1 << 64 else None

    def _lower_limit(self, num_rows: int) -> None:
        fresh = np.array(self._pending, dtype=np.uint64)
        self._pending = []
        self._admitted.append(fresh)
        lowest = np.concatenate([self._lowest, fresh])
        if len(lowest) > num_rows:
            # The lowest that isn't among them: they are below it.
            lowest = np.partition(lowest, num_rows)
            self._limit = int(lowest[num_rows])
            lowest = lowest[:num_rows]
        self._lowest = lowest
