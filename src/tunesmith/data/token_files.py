"""Stage two: a set's JSON lines → a memory-mapped Arrow file of labelled examples.

Run as a program it encodes one shard: that way the work needs neither the caller's `__main__` nor a fork
of a process that may hold threads and a GPU.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from tunesmith.data.encode import RowError
from tunesmith.data.examples import Example
from tunesmith.data.fit import Counts, Limits, fit
from tunesmith.data.formats import Findings, RowFormat
from tunesmith.data.mixture import encode_rows
from tunesmith.data.split import with_progress
from tunesmith.errors import TrainingError

logger = logging.getLogger(__name__)

_BATCH_ROWS = 512
_BATCH_BYTES = 1 << 22
_ROWS_PER_PROCESS = 4000
_COLUMNS = [("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_())), ("row", pa.int64())]
# One record a segment, those of an example behind one another; a single data set's say nothing of it.
_SCHEMA = pa.schema(_COLUMNS)
_MIXED_SCHEMA = pa.schema([*_COLUMNS, ("dataset_id", pa.int32())])


@dataclass(frozen=True)
class Shard:
    """A run of whole lines of a JSON lines file, by bytes; `first_row` is the line it begins at."""

    rows_file: str
    start: int
    end: int
    first_row: int
    arrow_file: str


def write_tokens(
    rows_file: Path,
    arrow_file: Path,
    formats: Sequence[RowFormat],
    limits: Limits,
    num_proc: int,
) -> Counts:
    """Encode every row of `rows_file` into `arrow_file`, with several processes if there are many rows.

    `formats` are those of the data sets, with their tokenizer.

    Raises:
        RowError: the chat template can't render a row; `index` is its line, from 0.
    """
    with rows_file.open("rb") as stream:
        num_rows = sum(1 for _ in stream)
    processes = min(num_proc, len(os.sched_getaffinity(0)), num_rows // _ROWS_PER_PROCESS)
    if processes < 2:
        whole = Shard(str(rows_file), 0, rows_file.stat().st_size, 0, str(arrow_file))
        return encode_shard(formats, whole, limits)
    shards = _cut_shards(rows_file, arrow_file, num_rows, processes)
    pickled = arrow_file.with_suffix(".formats")
    pickled.write_bytes(pickle.dumps(formats))
    counts = _run_processes(shards, pickled, limits)
    with pa.OSFile(str(arrow_file), "wb") as sink, pa.ipc.new_file(sink, _schema_of(formats)) as writer:
        for shard in shards:
            with pa.OSFile(shard.arrow_file) as source, pa.ipc.open_file(source) as reader:
                for i in range(reader.num_record_batches):
                    writer.write_batch(reader.get_batch(i))
            Path(shard.arrow_file).unlink()
    pickled.unlink()
    return counts


def _cut_shards(rows_file: Path, arrow_file: Path, num_rows: int, number: int) -> list[Shard]:
    starts = [num_rows * i // number for i in range(number)]
    borders: list[int] = []
    position = 0
    with rows_file.open("rb") as stream:
        for row, line in enumerate(stream):
            if len(borders) < number and row == starts[len(borders)]:
                borders.append(position)
            position += len(line)
    ends = [*borders[1:], position]
    return [
        Shard(str(rows_file), start, end, row, f"{arrow_file}.{i}")
        for i, (start, end, row) in enumerate(zip(borders, ends, starts, strict=True))
    ]


def encode_shard(
    formats: Sequence[RowFormat],
    shard: Shard,
    limits: Limits,
    progress: Callable[[int], None] | None = None,
) -> Counts:
    """Encode the rows of one shard into its Arrow file; `progress` gets the rows of each batch."""
    counts = Counts()
    schema = _schema_of(formats)
    row = shard.first_row
    with (
        open(shard.rows_file, "rb") as stream,
        pa.OSFile(shard.arrow_file, "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for batch in _read_batches(stream, shard.start, shard.end):
            try:
                encoded = encode_rows(formats, batch, counts.findings)
                examples = _to_arrow(encoded, schema, row, limits, counts)
            except RowError as error:
                raise RowError(error.message, error.hint, row + error.index) from error
            if examples.num_rows:
                writer.write_batch(examples)
            row += len(batch)
            if progress is not None:
                progress(len(batch))
    return counts


def _read_batches(stream: BinaryIO, start: int, end: int) -> Iterator[list[dict[str, Any]]]:
    stream.seek(start)
    batch: list[dict[str, Any]] = []
    size = 0
    while start < end:
        line = stream.readline()
        start += len(line)
        size += len(line)
        batch.append(json.loads(line))
        if len(batch) == _BATCH_ROWS or size > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _schema_of(formats: Sequence[RowFormat]) -> pa.Schema:
    return _SCHEMA if len(formats) == 1 else _MIXED_SCHEMA


def _to_arrow(
    encoded: Iterable[list[Example]], schema: pa.Schema, first_row: int, limits: Limits, counts: Counts
) -> pa.RecordBatch:
    # Flat from the start: lists that live as long as the batch would be walked by the garbage collector.
    ids, trained = array("i"), bytearray()
    ends, rows, dataset_ids = array("i", [0]), array("q"), array("i")
    is_mixed = schema is _MIXED_SCHEMA
    for row, examples in enumerate(encoded, start=first_row):
        if not examples:
            counts.dropped += 1
            counts.untrained += 1
        for example in examples:
            for segment in fit(example, limits, counts):
                ids.extend(segment.input_ids)
                trained.extend(segment.trained)
                ends.append(len(ids))
                rows.append(row)
            if is_mixed:
                dataset_ids.extend([example.dataset_id] * (len(rows) - len(dataset_ids)))
    offsets = pa.array(np.frombuffer(ends, np.int32))
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(ids, np.int32))),
        pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(trained, np.bool_))),
        pa.array(np.frombuffer(rows, np.int64)),
        pa.array(np.frombuffer(dataset_ids, np.int32)),
    ]
    return pa.record_batch(columns if is_mixed else columns[:-1], schema=schema)


def _run_processes(shards: list[Shard], pickled: Path, limits: Limits) -> Counts:
    """Encode each shard in a process of its own. Its answers are JSON lines: rows done, counts or an error."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, *_folders_of_own_code(), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    jobs = [
        json.dumps({"shard": asdict(shard), "formats": str(pickled), "limits": asdict(limits)})
        for shard in shards
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, job],
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environ,
        )
        for job in jobs
    ]
    progress = _Progress()
    try:
        with ThreadPoolExecutor(len(processes)) as threads:
            answers = list(threads.map(lambda process: _follow(process, progress), processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    counts = Counts()
    for answer in answers:
        if "error" in answer:
            raise RowError(answer["error"], answer["hint"], answer["row"])
        counts += Counts(**{**answer, "findings": Findings(answer["findings"])})
    return counts


def _folders_of_own_code() -> list[str]:
    """Return where transformers has put the modules of models that bring code: a tokenizer's class is one of them."""
    modules = sys.modules.get("transformers_modules")
    return [] if modules is None else [str(Path(folder).absolute().parent) for folder in modules.__path__]


class _Progress:
    """Adds up the rows that several threads hear of, and logs them now and then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ticks = with_progress(iter(int, 1), "tokenized")

    def add(self, rows: int) -> None:
        with self._lock:
            for _ in range(rows):
                next(self._ticks)


def _follow(process: subprocess.Popen[str], progress: _Progress) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        answer: dict[str, Any] = json.loads(line)
        if "done" not in answer:
            return answer
        progress.add(answer["done"])
    raise TrainingError(
        f"a process that tokenizes ended with exit code {process.wait()}",
        "its own message stands above; with num_proc 1 the work stays in one process",
    )


def _answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


def main(job_text: str) -> None:
    """Encode the shard of one job."""
    job = json.loads(job_text)
    formats = pickle.loads(Path(job["formats"]).read_bytes())
    shard, limits = Shard(**job["shard"]), Limits(**job["limits"])
    try:
        counts = encode_shard(formats, shard, limits, lambda rows: _answer({"done": rows}))
    except RowError as error:
        _answer({"error": error.message, "hint": error.hint, "row": error.index})
        return
    _answer(vars(counts))


if __name__ == "__main__":
    main(sys.argv[1])
