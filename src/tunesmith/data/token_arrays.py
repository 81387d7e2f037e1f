"""What is known of each example of a set, and the packs they are put in: arrays beside the set's Arrow file."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from tunesmith.config import TrainConfig
from tunesmith.data.concatenation import count_trained, cut_at_pack_ends, find_first_trained
from tunesmith.data.fit import Counts
from tunesmith.data.packing import pack_examples


@dataclass(frozen=True)
class SetStats:
    """What became of one set's rows, the counts as `Counts` has them. Lengths and totals are in tokens.

    `packing_efficiency` is the share of the packs that is filled. `cut` examples are trained in several packs; the
    `untrained_pieces` only fill one, as beginnings of prompts that the next one holds whole.
    """

    rows: int
    examples: int
    truncated: int
    dropped: int
    untrained: int
    tokens: int
    trained_tokens: int
    packs: int
    packing_efficiency: float
    longest: int
    # What the first versions didn't count.
    over_long: int = 0
    lost_tokens: int = 0
    lost_answers: int = 0
    split: int = 0
    windows: int = 0
    cut: int = 0
    untrained_pieces: int = 0
    findings: dict[str, int] = field(default_factory=dict)

    @property
    def long_prompts(self) -> int:
        """The rows or examples dropped because their prompts alone fill a sequence."""
        return self.dropped - self.untrained - self.over_long


def write_arrays(
    tokens: Path, name: str, num_rows: int, counts: Counts, config: TrainConfig, num_segments: int
) -> SetStats:
    """Write the per-example arrays and the packs of one set beside its Arrow file."""
    arrays = _read_examples(tokens / f"{name}.arrow", num_segments)
    pack_tokens = num_segments * config.max_seq_length
    cut = 0
    if config.concatenate:
        arrays, cut = _concatenate(tokens / f"{name}.arrow", arrays, config)
    else:
        examples, bounds = pack_examples(arrays["lengths"], pack_tokens, config.seed)
        arrays |= {"pack_examples": examples, "pack_bounds": bounds}
    for array_name, values in arrays.items():
        np.save(tokens / f"{name}-{array_name}.npy", values)
    total = int(arrays["lengths"].sum(dtype=np.int64))
    packs = len(arrays["pack_bounds"])
    return SetStats(
        rows=num_rows,
        examples=len(arrays["lengths"]),
        tokens=total,
        trained_tokens=int(arrays["num_trained"].sum(dtype=np.int64)),
        packs=packs,
        packing_efficiency=total / (packs * pack_tokens) if packs else 0.0,
        longest=int(arrays["lengths"].max(initial=0)),
        cut=cut,
        untrained_pieces=int((arrays["num_trained"] == 0).sum()),
        **{**vars(counts), "findings": dict(counts.findings)},
    )


def _concatenate(
    arrow_file: Path, of_examples: dict[str, np.ndarray], config: TrainConfig
) -> tuple[dict[str, np.ndarray], int]:
    """Return the arrays of the pieces that fill the packs, and how many examples are trained in several."""
    first_trained = find_first_trained(arrow_file)
    pieces = cut_at_pack_ends(of_examples["lengths"], first_trained, config.max_seq_length, config.seed)
    num_trained = count_trained(arrow_file, pieces)
    arrays = {name: values[pieces.examples] for name, values in of_examples.items()} | {
        "lengths": pieces.lengths,
        "num_trained": num_trained,
        "pieces": np.stack([pieces.examples, pieces.starts], axis=1),
        "pack_examples": np.arange(len(pieces.examples)),
        "pack_bounds": pieces.bounds,
    }
    _, counts = np.unique(pieces.examples[num_trained > 0], return_counts=True)
    return arrays, int((counts > 1).sum())


def _read_examples(arrow_file: Path, num_segments: int) -> dict[str, np.ndarray]:
    """Return the per-example arrays. Holds 16 bytes a segment."""
    lengths, rows, num_trained, dataset_ids = array("i"), array("q"), array("i"), array("i")
    # Read rather than mapped: mapped pages would count as this process's memory.
    with pa.OSFile(str(arrow_file)) as source, pa.ipc.open_file(source) as reader:
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            offsets = batch[0].offsets.to_numpy()
            trained = batch[1].values.to_numpy(zero_copy_only=False)
            lengths.frombytes(np.diff(offsets).tobytes())
            rows.frombytes(batch[2].to_numpy().tobytes())
            num_trained.frombytes(np.add.reduceat(trained, offsets[:-1], dtype=np.int32).tobytes())
            for of_example in batch.columns[3:]:
                dataset_ids.frombytes(of_example.to_numpy().tobytes())
    segments = _by_example(lengths, num_segments)
    arrays = {
        "lengths": segments.sum(axis=1, dtype=np.int32),
        "rows": _by_example(rows, num_segments)[:, 0],
        "num_trained": _by_example(num_trained, num_segments).sum(axis=1, dtype=np.int32),
    }
    if num_segments > 1:
        arrays["segments"] = segments
    if dataset_ids:
        arrays["dataset_ids"] = _by_example(dataset_ids, num_segments)[:, 0]
    return arrays


def _by_example(of_segment: array[int], num_segments: int) -> np.ndarray:
    return np.frombuffer(of_segment, dtype=of_segment.typecode).reshape(-1, num_segments)
