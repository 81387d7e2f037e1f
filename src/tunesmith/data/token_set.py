"""The labelled examples of one set, as the training loop reads them: memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

ARRAYS = ("lengths", "rows", "num_trained", "pack_examples", "pack_bounds")


class Packs(Sequence[np.ndarray]):
    """The packs of a token set: `packs[i]` are the int64 indices of its examples."""

    def __init__(self, examples: np.ndarray, bounds: np.ndarray) -> None:
        self._examples = examples
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._bounds[index]
        return np.asarray(self._examples[start:end])


@dataclass(frozen=True, eq=False)
class TokenSet:
    """The labelled examples of one set, memory-mapped.

    lengths: int32 [num_examples], tokens of each example.
    rows: int64 [num_examples], the example's line in its .jsonl, from 0.
    num_trained: int32 [num_examples], trained tokens of each example.
    """

    path: Path
    lengths: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    num_trained: np.ndarray = field(repr=False)
    packs: Packs = field(repr=False)

    @property
    def num_examples(self) -> int:
        return len(self.lengths)

    @cached_property
    def _batches(self) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, pa.BooleanArray]]]:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        firsts = np.cumsum([0] + [batch.num_rows for batch in batches])
        return firsts, [
            (batch[0].offsets.to_numpy(), batch[0].values.to_numpy(), batch[1].values) for batch in batches
        ]

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the example's token ids, int32 [T], and for each whether it is trained, bool [T].

        The first token is never trained: nothing precedes it.
        """
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        firsts, batches = self._batches
        at = int(np.searchsorted(firsts, index, "right")) - 1
        offsets, ids, trained = batches[at]
        start, end = (int(offset) for offset in offsets[index - firsts[at] : index - firsts[at] + 2])
        return ids[start:end], trained.slice(start, end - start).to_numpy(zero_copy_only=False)


def open_set(folder: Path, name: str) -> TokenSet:
    """Map the files of the set `name` in `folder`."""
    lengths, rows, num_trained, examples, bounds = (
        np.load(folder / f"{name}-{array_name}.npy", mmap_mode="r") for array_name in ARRAYS
    )
    return TokenSet(folder / f"{name}.arrow", lengths, rows, num_trained, Packs(examples, bounds))
