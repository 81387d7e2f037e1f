"""The labelled examples of one set, as the training loop reads them: memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import pyarrow as pa

# Of each set: lengths, rows and num_trained by example, and the packs. `segments` is there where an example has
# several, `dataset_ids` where there are several data sets, `pieces` where examples are slices of the Arrow file's.
_ARRAYS = ("lengths", "rows", "num_trained", "pack_examples", "pack_bounds")


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


class Beyond(NamedTuple):
    """The lowest of the tokens from some number on, and how many examples have such ones."""

    token: int
    num_examples: int


@dataclass(frozen=True, eq=False)
class TokenSet:
    """The labelled examples of one set, memory-mapped.

    lengths: int32 [num_examples], tokens of each example.
    rows: int64 [num_examples], the example's line in its .jsonl, from 0.
    num_trained: int32 [num_examples], trained tokens of each example.
    segments: int32 [num_examples, num_segments], tokens of each segment.
    dataset_ids: int32 [num_examples], the example's data set, from 0.
    pieces: int64 [num_examples, 2], the record of the Arrow file that the example is a slice of, and its first token
        there; None where every example is a record.
    """

    path: Path
    lengths: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    num_trained: np.ndarray = field(repr=False)
    packs: Packs = field(repr=False)
    segments: np.ndarray = field(repr=False)
    dataset_ids: np.ndarray = field(repr=False)
    pieces: np.ndarray | None = field(repr=False, default=None)

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

    @property
    def num_segments(self) -> int:
        """How many segments each example has."""
        return int(self.segments.shape[1])

    def find_beyond(self, limit: int) -> Beyond | None:
        """Return which token ids from `limit` on there are; None without any. Reads all tokens."""
        firsts, batches = self._batches
        lowest, records = [], []
        for first, (offsets, ids, _) in zip(firsts, batches, strict=False):
            places = np.flatnonzero(ids >= limit)
            if len(places):
                lowest.append(int(ids[places].min()))
                records.append(first + np.searchsorted(offsets, places, "right") - 1)
        if not lowest:
            return None
        parts = self.num_segments if self.pieces is None else 1
        return Beyond(min(lowest), len(np.unique(np.concatenate(records) // parts)))

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the example's token ids, int32 [T], and for each whether it is trained, bool [T].

        Its segments stand behind one another. The first token of each is never trained: nothing precedes it.
        """
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        if self.pieces is not None:
            return self._read_piece(index)
        return self._read(index * self.num_segments, self.num_segments)

    def segment(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `example` does, of one segment of all, those of an example behind one another."""
        return self._read(index, 1) if self.pieces is None else self._read_piece(index)

    def _read_piece(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        assert self.pieces is not None
        record, start = self.pieces[index].tolist()
        ids, trained = self._read(record, 1, start, start + int(self.lengths[index]))
        return ids, trained & (np.arange(len(ids)) > 0)

    def _read(
        self, first: int, number: int, begin: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of `number` records of the Arrow file, all in one of its batches, from `begin` to `stop`."""
        firsts, batches = self._batches
        at = int(np.searchsorted(firsts, first, "right")) - 1
        offsets, ids, trained = batches[at]
        record = first - firsts[at]
        start = int(offsets[record])
        end = int(offsets[record + number]) if stop is None else start + stop
        start += begin
        return ids[start:end], trained.slice(start, end - start).to_numpy(zero_copy_only=False)


def open_set(folder: Path, name: str) -> TokenSet:
    """Map the files of the set `name` in `folder`."""
    lengths, rows, num_trained, examples, bounds = (
        np.load(folder / f"{name}-{array_name}.npy", mmap_mode="r") for array_name in _ARRAYS
    )
    pieces = folder / f"{name}-pieces.npy"
    return TokenSet(
        folder / f"{name}.arrow",
        lengths,
        rows,
        num_trained,
        Packs(examples, bounds),
        _load_or(folder / f"{name}-segments.npy", lengths.reshape(-1, 1)),
        _load_or(folder / f"{name}-dataset_ids.npy", np.broadcast_to(np.int32(0), lengths.shape)),
        np.load(pieces, mmap_mode="r") if pieces.exists() else None,
    )


def _load_or(path: Path, absent: np.ndarray) -> np.ndarray:
    return np.load(path, mmap_mode="r") if path.exists() else absent
