"""Examples laid behind one another and cut where a pack ends, so that every pack but the last is full."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Pieces:
    """Slices of examples, those of a pack behind one another; each is an example of its own.

    examples: int64 [num_pieces], which example each is cut from.
    starts: int64 [num_pieces], its first token there.
    lengths: int32 [num_pieces], in tokens.
    bounds: int64 [num_packs, 2], where among the pieces each pack begins and ends.
    """

    examples: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray

    def count_cut(self) -> int:
        """Return how many examples were cut."""
        # Of a lone first token at a pack's end nothing is lost: the next pack begins with it.
        _, counts = np.unique(self.examples[self.lengths > 1], return_counts=True)
        return int((counts > 1).sum())


def cut_at_pack_ends(lengths: np.ndarray, max_seq_length: int, seed: int) -> Pieces:
    """Lay examples of these lengths behind one another in random order, and cut them into packs.

    A pack begins with the token that the one before it ends with, if that cut an example: a first token can't be
    trained, because nothing precedes it that could predict it. So every trained token is trained once, and every
    pack but the last holds `max_seq_length` tokens. Deterministic in its arguments.
    """
    order = np.random.default_rng([seed, max_seq_length, len(lengths)]).permutation(len(lengths))
    ends = np.cumsum(lengths[order], dtype=np.int64)
    begins = ends - lengths[order]
    pack_begins, pack_ends = _cut_packs(ends, max_seq_length)
    firsts = np.searchsorted(ends, pack_begins, "right")
    counts = np.searchsorted(ends, pack_ends, "left") + 1 - firsts
    bounds = np.cumsum(counts, dtype=np.int64)
    bounds = np.stack([bounds - counts, bounds], axis=1)
    places = np.repeat(firsts - bounds[:, 0], counts) + np.arange(counts.sum())
    starts = np.maximum(begins[places], np.repeat(pack_begins, counts))
    stops = np.minimum(ends[places], np.repeat(pack_ends, counts))
    return Pieces(order[places], starts - begins[places], (stops - starts).astype(np.int32), bounds)


def _cut_packs(ends: np.ndarray, max_seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each pack begins and ends, in tokens of all examples together, of which these are the ends."""
    total = int(ends[-1]) if len(ends) else 0
    begins, stops = [], []
    begin = 0
    while begin < total:
        stop = min(begin + max_seq_length, total)
        begins.append(begin)
        stops.append(stop)
        begin = stop if ends[np.searchsorted(ends, stop)] == stop else stop - 1
    return np.array(begins, dtype=np.int64), np.array(stops, dtype=np.int64)


def count_trained(arrow_file: Path, pieces: Pieces) -> np.ndarray:
    """Return the trained tokens of each piece, int32: its first isn't one."""
    num_trained = np.zeros(len(pieces.examples), dtype=np.int32)
    order = np.argsort(pieces.examples, kind="stable")
    examples = pieces.examples[order]
    first = 0
    # Read rather than mapped: mapped pages would count as this process's memory.
    with pa.OSFile(str(arrow_file)) as source, pa.ipc.open_file(source) as reader:
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            offsets = batch[0].offsets.to_numpy()
            trained = batch[1].values.to_numpy(zero_copy_only=False)
            so_far = np.concatenate([[0], np.cumsum(trained, dtype=np.int32)])
            here = order[slice(*np.searchsorted(examples, [first, first + batch.num_rows]))]
            starts = offsets[pieces.examples[here] - first] + pieces.starts[here]
            num_trained[here] = so_far[starts + pieces.lengths[here]] - so_far[starts + 1]
            first += batch.num_rows
    return num_trained
