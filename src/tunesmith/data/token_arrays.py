"""What is known of each example of a set, and the packs they are put in: arrays beside the set's Arrow file."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from tunesmith.config import TrainConfig
from tunesmith.data.packing import pack_examples
from tunesmith.data.token_files import Counts


@dataclass(frozen=True)
class SetStats:
    """What became of one set's rows. Lengths and totals are in tokens.

    `truncated` examples were cut at the right; `dropped` rows or examples don't train, of them `untrained`
    because they hold no completion at all; `findings` are what else their owner should know. `packing_efficiency` is the share of the packs that is filled.
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
    findings: dict[str, int] = field(default_factory=dict)


def write_arrays(
    tokens: Path, name: str, num_rows: int, counts: Counts, config: TrainConfig, num_segments: int
) -> SetStats:
    """Write the per-example arrays and the packs of one set beside its Arrow file."""
    lengths, num_trained = _write_examples(tokens, name, num_segments)
    pack_tokens = num_segments * config.max_seq_length
    examples, bounds = pack_examples(lengths, pack_tokens, config.seed)
    _save(tokens, name, {"pack_examples": examples, "pack_bounds": bounds})
    total = int(lengths.sum(dtype=np.int64))
    return SetStats(
        rows=num_rows,
        examples=len(lengths),
        truncated=counts.truncated,
        dropped=counts.dropped,
        untrained=counts.untrained,
        tokens=total,
        trained_tokens=num_trained,
        packs=len(bounds),
        packing_efficiency=total / (len(bounds) * pack_tokens) if len(bounds) else 0.0,
        longest=int(lengths.max(initial=0)),
        findings=dict(counts.findings),
    )


def _write_examples(tokens: Path, name: str, num_segments: int) -> tuple[np.ndarray, int]:
    """Write the per-example arrays; return the lengths and the number of trained tokens. Holds 16 bytes a segment."""
    lengths, rows, num_trained, dataset_ids = array("i"), array("q"), array("i"), array("i")
    # Read rather than mapped: mapped pages would count as this process's memory.
    with pa.OSFile(str(tokens / f"{name}.arrow")) as source, pa.ipc.open_file(source) as reader:
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
    _save(tokens, name, arrays)
    return arrays["lengths"], int(arrays["num_trained"].sum(dtype=np.int64))


def _by_example(of_segment: array[int], num_segments: int) -> np.ndarray:
    return np.frombuffer(of_segment, dtype=of_segment.typecode).reshape(-1, num_segments)


def _save(tokens: Path, name: str, arrays: dict[str, np.ndarray]) -> None:
    for array_name, values in arrays.items():
        np.save(tokens / f"{name}-{array_name}.npy", values)
