"""Which rows of the sets are equal to one another, told from hashes: some 28 bytes a row are held."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.data.formats import RenderedRow, RowFormat
from tunesmith.data.mixture import dataset_of, without_tag
from tunesmith.data.split import SETS

Found = Literal["row", "prompt"]
_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, eq=False)
class RowHashes:
    """The rows of one set, each by its line.

    equal: uint64 [rows], the same for rows that say the same.
    alike: uint64 [rows], the same even where case and white space differ.
    dataset_ids: int32 [rows].
    sizes: int64 [rows], the bytes of each line.
    """

    equal: np.ndarray
    alike: np.ndarray
    dataset_ids: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.equal)


def hash_sets(data_dir: Path, formats: Sequence[RowFormat]) -> dict[str, RowHashes]:
    """Return the hashes of the prepared sets in `data_dir` by name; `formats` are those of the data sets."""
    return {name: hash_rows(data_dir / f"{name}.jsonl", formats) for name in SETS}


def hash_rows(rows_file: Path, formats: Sequence[RowFormat]) -> RowHashes:
    """Return the hashes of the rendered rows in a file.

    Rows are compared by what decides their set, `split_key`: ids and dates of messages don't count.
    """
    equal, alike, dataset_ids = array("Q"), array("Q"), array("i")
    sizes = array("q")
    with rows_file.open("rb") as stream:
        for line in stream:
            row = json.loads(line)
            dataset_id = dataset_of(row)
            said = formats[dataset_id].split_key(without_tag(row))
            equal.append(_hash(said))
            alike.append(_hash(_fold(said)))
            dataset_ids.append(dataset_id)
            sizes.append(len(line))
    return RowHashes(
        np.frombuffer(equal, np.uint64),
        np.frombuffer(alike, np.uint64),
        np.frombuffer(dataset_ids, np.int32),
        np.frombuffer(sizes, np.int64),
    )


def find_in_rows(
    rows: Mapping[int, RenderedRow],
    row_formats: Sequence[RowFormat],
    rows_file: Path,
    formats: Sequence[RowFormat],
) -> dict[int, Found]:
    """Return which rows are in a file of rendered rows, by their number: the whole row, or what it asks last.

    `row_formats` are those of the rows, `formats` those of the file's. Case and white space don't count.
    """
    whole, asked, last_texts = {}, {}, set()
    for number, row in rows.items():
        row_format, row = row_formats[dataset_of(row)], without_tag(row)
        whole[number] = hash_alike(row_format.split_key(row))
        if questions := row_format.questions(row):
            asked[number] = hash_alike(questions[-1])
            last_texts.add(_last_text(questions[-1]))
    wanted_rows, wanted = set(whole.values()), set(asked.values())
    found_rows, found = set(), set()
    with rows_file.open("rb") as stream:
        for line in stream:
            row = json.loads(line)
            row_format, row = formats[dataset_of(row)], without_tag(row)
            # What is asked last tells most rows apart, and costs little.
            alike = [it for it in row_format.questions(row) if _last_text(it) in last_texts]
            if alike:
                found |= wanted & set(map(hash_alike, alike))
                found_rows |= wanted_rows & {hash_alike(row_format.split_key(row))}
    return {
        number: "row" if whole[number] in found_rows else "prompt"
        for number in rows
        if whole[number] in found_rows or asked.get(number) in found
    }


def hash_alike(said: Any) -> int:
    """Return a hash that is the same for texts, and what holds them, that differ in case and white space alone."""
    return _hash(_fold(said))


def count_repeats(hashes: Sequence[np.ndarray]) -> int:
    """Return how many rows of all the sets together repeat an earlier one."""
    everything = np.concatenate(hashes)
    return len(everything) - len(np.unique(everything))


def are_shared(hashes: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Return for each of the rows whether one of the others is equal, bool [rows]."""
    return np.isin(hashes, np.concatenate(others))


def are_repeated(hashes: np.ndarray) -> np.ndarray:
    """Return for each of the rows whether another one among them is equal, bool [rows]."""
    _, same, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    repeated: np.ndarray = counts[same] > 1
    return repeated


def _hash(said: Any) -> int:
    text = json.dumps(said, sort_keys=True)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _last_text(question: Any) -> str:
    """Return the last text of what is asked, which is a text or messages, without case and white space."""
    last = question[-1].get("content") if isinstance(question, list) else question
    return "".join(str(last).split()).casefold()


def _fold(value: Any) -> Any:
    if isinstance(value, str):
        return _WHITE_SPACE.sub(" ", value).strip().casefold()
    if isinstance(value, list):
        return [_fold(item) for item in value]
    if isinstance(value, dict):
        return {key: _fold(item) for key, item in value.items()}
    return value
