"""What became of single rows of a prepared set: they are encoded once more, as the preparation did it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.examples import Example
from tunesmith.data.fit import Counts, Limits
from tunesmith.data.formats import Findings, RenderedRow, RowFormat
from tunesmith.data.mixture import dataset_of, encode_rows, without_tag
from tunesmith.data.token_files import Shard, encode_shard


@dataclass(frozen=True)
class Fate:
    """One row of a set: `examples` are those it gives, whole, whatever their length; `counts` what the limit made of it."""

    dataset_id: int
    rendered: RenderedRow
    examples: list[Example]
    counts: Counts


def find_fates(
    rows_file: Path, rows: Collection[int], formats: Sequence[RowFormat], limits: Limits
) -> dict[int, Fate]:
    """Return what became of these rows (lines of the file, from 0). Meant for some hundred of them.

    `formats` are those of the data sets, with their tokenizer.
    """
    wanted, fates = set(rows), {}
    start = 0
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder, rows_file.open("rb") as stream:
        for row, line in enumerate(stream):
            if row in wanted:
                # The very code that wrote the set, on this line alone.
                shard = Shard(str(rows_file), start, start + len(line), row, f"{folder}/row.arrow")
                fates[row] = _fate_of(json.loads(line), formats, encode_shard(formats, shard, limits))
            start += len(line)
    return fates


def _fate_of(row: RenderedRow, formats: Sequence[RowFormat], counts: Counts) -> Fate:
    (examples,) = encode_rows(formats, [row], Findings())
    return Fate(dataset_of(row), without_tag(row), examples, counts)
