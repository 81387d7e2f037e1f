"""Examples laid behind one another and cut where a pack ends, so that every pack but the last is full."""

from __future__ import annotations

from collections.abc import Iterator
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


def cut_at_pack_ends(
    lengths: np.ndarray, first_trained: np.ndarray, max_seq_length: int, seed: int
) -> Pieces:
    """Lay examples of these lengths behind one another in random order, and cut them into packs.

    A pack begins with the token that the one before it ends with, if that cut an example: a first token can't be
    trained, because nothing precedes it that could predict it. Where the cut is before the example's first trained
    token, the pack begins with the whole example, so that its answer sees its prompt. So every trained token is
    trained once, and every pack but the last holds `max_seq_length` tokens. Deterministic in its arguments.
    """
    order = np.random.default_rng([seed, max_seq_length, len(lengths)]).permutation(len(lengths))
    ends = np.cumsum(lengths[order], dtype=np.int64)
    begins = ends - lengths[order]
    pack_begins, pack_ends = _cut_packs(begins, ends, begins + first_trained[order], max_seq_length)
    firsts = np.searchsorted(ends, pack_begins, "right")
    counts = np.searchsorted(ends, pack_ends, "left") + 1 - firsts
    bounds = np.cumsum(counts, dtype=np.int64)
    bounds = np.stack([bounds - counts, bounds], axis=1)
    places = np.repeat(firsts - bounds[:, 0], counts) + np.arange(counts.sum())
    starts = np.maximum(begins[places], np.repeat(pack_begins, counts))
    stops = np.minimum(ends[places], np.repeat(pack_ends, counts))
    return Pieces(order[places], starts - begins[places], (stops - starts).astype(np.int32), bounds)


def _cut_packs(
    begins: np.ndarray, ends: np.ndarray, trained_from: np.ndarray, max_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each pack begins and ends, in tokens of all examples together, as those of the arguments."""
    total = int(ends[-1]) if len(ends) else 0
    pack_begins, pack_ends = [], []
    begin = 0
    while begin < total:
        end = min(begin + max_seq_length, total)
        pack_begins.append(begin)
        pack_ends.append(end)
        last = np.searchsorted(ends, end)
        if ends[last] == end:
            begin = end
        elif end <= trained_from[last] and begins[last] > begin:
            begin = int(begins[last])
        else:
            begin = end - 1
    return np.array(pack_begins, dtype=np.int64), np.array(pack_ends, dtype=np.int64)


def find_first_trained(arrow_file: Path) -> np.ndarray:
    """Return the place of each example's first trained token, int32."""
    found = []
    for offsets, trained in _read_batches(arrow_file):
        places = np.flatnonzero(trained)
        found.append((places[np.searchsorted(places, offsets[:-1])] - offsets[:-1]).astype(np.int32))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int32)


def count_trained(arrow_file: Path, pieces: Pieces) -> np.ndarray:
    """Return the trained tokens of each piece, int32: its first isn't one."""
    num_trained = np.zeros(len(pieces.examples), dtype=np.int32)
    order = np.argsort(pieces.examples, kind="stable")
    examples = pieces.examples[order]
    first = 0
    for offsets, trained in _read_batches(arrow_file):
        so_far = np.concatenate([[0], np.cumsum(trained, dtype=np.int32)])
        beyond = first + len(offsets) - 1
        here = order[slice(*np.searchsorted(examples, [first, beyond]))]
        starts = offsets[pieces.examples[here] - first] + pieces.starts[here]
        num_trained[here] = so_far[starts + pieces.lengths[here]] - so_far[starts + 1]
        first = beyond
    return num_trained


def _read_batches(arrow_file: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the bounds of the examples of each batch, and for each token whether it is trained."""
    # Read rather than mapped: mapped pages would count as this process's memory.
    with pa.OSFile(str(arrow_file)) as source, pa.ipc.open_file(source) as reader:
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            yield batch[0].offsets.to_numpy(), batch[1].values.to_numpy(zero_copy_only=False)
