"""Stage one: rows → training.jsonl, validation.jsonl and test.jsonl, by a seeded split.

A row's side follows from a hash of the seed and its rendered text, so identical rows share a side.
"""

from __future__ import annotations

import json
import logging
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.formats import RenderedRow, RowFormat, choose_format
from tunesmith.data.mixture import dataset_of, tag, without_tag
from tunesmith.data.sources import describe_source, read_rows
from tunesmith.errors import DataError

logger = logging.getLogger(__name__)

SETS = ("training", "validation", "test")
_CHECKED_ROWS = 100
_PROGRESS_S = 10.0

T = TypeVar("T")


def check_sources(config: TrainConfig) -> list[RowFormat]:
    """Choose the row format of each data set, and try it on the first rows; cheap, for refusing bad input early.

    Raises:
        ConfigError: a malformed template.
        DataError: a data set is absent, empty or malformed, or a column is missing.
    """
    return [_check_source(settings) for settings in config.data_sets]


def _check_source(settings: HFDatasetConfig) -> RowFormat:
    rows = read_rows(settings)
    where, first = next(rows)
    row_format = choose_format(settings, first, describe_source(settings))
    row_format.render(first, where)
    for where, row in islice(rows, _CHECKED_ROWS - 1):
        row_format.render(row, where)
    return row_format


def write_split(config: TrainConfig, formats: Sequence[RowFormat], folder: Path) -> dict[str, int]:
    """Write the three sets into `folder`, in the order of the sources, and return their rows.

    Holds 16 bytes a row. An empty set is an empty file.

    Raises:
        DataError: a row is malformed; the message names it.
    """
    everything = folder / "rows.jsonl"
    with everything.open("wb") as stream:
        hashes = [
            _write_rendered(stream, settings, row_format, config.seed, tag(i, len(formats)))
            for i, (settings, row_format) in enumerate(zip(config.data_sets, formats, strict=True))
        ]
    sides = _choose_sides(hashes, config.data_sets)
    counts = {name: int((sides == side).sum()) for side, name in enumerate(SETS)}
    files = [(folder / f"{name}.jsonl").open("wb") for name in SETS]
    try:
        with everything.open("rb") as lines:
            for line, side in zip(lines, sides.tobytes(), strict=True):
                files[side].write(line)
    finally:
        for file in files:
            file.close()
    everything.unlink()
    return counts


def _write_rendered(
    stream: BinaryIO, settings: HFDatasetConfig, row_format: RowFormat, seed: int, tagged: dict[str, int]
) -> np.ndarray:
    """Write the rendered rows of a data set; return the hash of each, uint64."""
    hashes = array("Q")
    key = seed.to_bytes(8, "little")
    for where, row in with_progress(read_rows(settings), "read"):
        rendered = row_format.render(row, where)
        stream.write(_dump({**rendered, **tagged}, where, sort_keys=False) + b"\n")
        canonical = _dump(row_format.split_key(rendered), where, sort_keys=True)
        hashes.append(int.from_bytes(blake2b(canonical, digest_size=8, key=key).digest(), "little"))
    return np.frombuffer(hashes, dtype=np.uint64)


def _choose_sides(hashes: Sequence[np.ndarray], data_sets: Sequence[HFDatasetConfig]) -> np.ndarray:
    """Return for each row the number of its set in `SETS`, uint8.

    A row that several data sets have is held out of all if it is out of one.
    """
    sides = np.concatenate(
        [
            sum((of_row >= bound).astype(np.uint8) for bound in _cut(np.sort(of_row), settings))
            for of_row, settings in zip(hashes, data_sets, strict=True)
        ]
    )
    if len(hashes) == 1:
        return sides
    _, same = np.unique(np.concatenate(hashes), return_inverse=True)
    furthest = np.zeros(len(sides), dtype=np.uint8)
    np.maximum.at(furthest, same, sides)
    return furthest[same]


def locate(config: TrainConfig, formats: Sequence[RowFormat], rendered: RenderedRow) -> str:
    """Return the name of the first source row that renders to `rendered`, for an error."""
    settings, row_format = config.data_sets[dataset_of(rendered)], formats[dataset_of(rendered)]
    rendered = without_tag(rendered)
    for where, row in read_rows(settings):
        if row_format.render(row, where) == rendered:
            return where
    return describe_source(settings)


def with_progress(items: Iterable[T], verb: str) -> Iterator[T]:
    """Yield the items, and log now and then how many they are."""
    last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if count % 1024 == 0 and time.monotonic() - last > _PROGRESS_S:
            last = time.monotonic()
            logger.info("%s %s rows so far", verb, f"{count:,}")


def _dump(rendered: dict[str, Any], where: str, sort_keys: bool) -> bytes:
    try:
        return json.dumps(rendered, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair, which is no character", "mend the row's text"
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} holds what JSON can't: {error}", "keep text, numbers, lists and objects"
        ) from error


def _cut(ordered: np.ndarray, settings: HFDatasetConfig) -> tuple[int, int]:
    """Return the hashes at which the validation and the test set begin.

    Cuts lie between distinct hashes, as near to the asked shares as those allow. Some row always trains;
    with a ratio below 1 and two distinct rows, some row is held out, for validation first.
    """
    num_rows, beyond = len(ordered), 1 << 64
    if settings.train_split_ratio == 1.0 or ordered[0] == ordered[-1]:
        return beyond, beyond
    first_group = int(np.searchsorted(ordered, ordered[0], "right"))
    last_group = int(np.searchsorted(ordered, ordered[-1], "left"))
    num_train = _nearest_border(
        ordered, round(num_rows * settings.train_split_ratio), first_group, last_group
    )
    num_test = round((num_rows - num_train) * settings.val_test_split_ratio)
    at_least = num_train
    if settings.val_test_split_ratio < 1.0:
        at_least = int(np.searchsorted(ordered, ordered[num_train], "right"))
    num_before_test = _nearest_border(ordered, num_rows - num_test, at_least, num_rows)
    test_from = beyond if num_before_test == num_rows else int(ordered[num_before_test])
    return int(ordered[num_train]), test_from


def _nearest_border(ordered: np.ndarray, target: int, lowest: int, highest: int) -> int:
    """Return the index nearest to `target`, within the bounds, at which a new hash begins."""
    target = min(max(target, lowest), highest)
    if target == len(ordered):
        return target
    below = int(np.searchsorted(ordered, ordered[target], "left"))
    above = int(np.searchsorted(ordered, ordered[target], "right"))
    nearest = below if target - below <= above - target else above
    return min(max(nearest, lowest), highest)
