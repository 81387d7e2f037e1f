"""Stage one: rows → training.jsonl, validation.jsonl and test.jsonl, by a seeded split.

A row's side follows from a hash of the seed and its rendered text, so identical rows share a side.
"""

from __future__ import annotations

import json
import logging
import time
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.data.sources import describe_source, read_rows
from tunesmith.data.templates import RowFormat, choose_format
from tunesmith.errors import DataError

logger = logging.getLogger(__name__)

SETS = ("training", "validation", "test")
_CHECKED_ROWS = 100
_PROGRESS_S = 10.0
# What is said in a message; ids and dates may come with it.
_SAID = ("role", "content", "tool_calls")

T = TypeVar("T")


def check_source(config: TrainConfig) -> RowFormat:
    """Choose the row format, and try it on the first rows; cheap, for refusing bad input early.

    Raises:
        ConfigError: a malformed template.
        DataError: the data set is absent, empty or malformed, or a column is missing.
    """
    rows = read_rows(config)
    where, first = next(rows)
    row_format = choose_format(config, first, describe_source(config), config.gives_template)
    row_format.render(first, where)
    for where, row in islice(rows, _CHECKED_ROWS - 1):
        row_format.render(row, where)
    return row_format


def write_split(config: TrainConfig, row_format: RowFormat, folder: Path) -> dict[str, int]:
    """Write the three sets into `folder`, in the order of the source, and return their rows.

    Holds 16 bytes a row. An empty set is an empty file.

    Raises:
        DataError: a row is malformed; the message names it.
    """
    everything = folder / "rows.jsonl"
    hashes = array("Q")
    key = config.seed.to_bytes(8, "little")
    with everything.open("wb") as stream:
        for where, row in with_progress(read_rows(config), "read"):
            rendered = row_format.render(row, where)
            stream.write(_dump(rendered, where, sort_keys=False) + b"\n")
            canonical = _dump(_what_is_said(rendered), where, sort_keys=True)
            hashes.append(int.from_bytes(blake2b(canonical, digest_size=8, key=key).digest(), "little"))
    of_row = np.frombuffer(hashes, dtype=np.uint64)
    bounds = _cut(np.sort(of_row), config)
    counts = dict.fromkeys(SETS, 0)
    files = {name: (folder / f"{name}.jsonl").open("wb") for name in SETS}
    try:
        with everything.open("rb") as lines:
            for line, value in zip(lines, hashes, strict=True):
                name = SETS[sum(value >= bound for bound in bounds)]
                counts[name] += 1
                files[name].write(line)
    finally:
        for file in files.values():
            file.close()
    everything.unlink()
    return counts


def _what_is_said(rendered: dict[str, Any]) -> dict[str, Any]:
    """Return what makes two rows the same: of messages, not the ids and dates that may come with them."""
    if "messages" not in rendered:
        return rendered
    said = [{key: message.get(key) for key in _SAID} for message in rendered["messages"]]
    return {**rendered, "messages": said}


def locate(config: TrainConfig, row_format: RowFormat, rendered: dict[str, Any]) -> str:
    """Return the name of the first source row that renders to `rendered`, for an error."""
    for where, row in read_rows(config):
        if row_format.render(row, where) == rendered:
            return where
    return describe_source(config)


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
        return json.dumps(rendered, ensure_ascii=False, sort_keys=sort_keys).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a surrogate pair, which is no character", "mend the row's text"
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where} holds what JSON can't: {error}", "keep text, numbers, lists and objects"
        ) from error


def _cut(ordered: np.ndarray, config: HFDatasetConfig) -> tuple[int, int]:
    """Return the hashes at which the validation and the test set begin.

    Cuts lie between distinct hashes, as near to the asked shares as those allow. Some row always trains;
    with a ratio below 1 and two distinct rows, some row is held out, for validation first.
    """
    num_rows, beyond = len(ordered), 1 << 64
    if config.train_split_ratio == 1.0 or ordered[0] == ordered[-1]:
        return beyond, beyond
    first_group = int(np.searchsorted(ordered, ordered[0], "right"))
    last_group = int(np.searchsorted(ordered, ordered[-1], "left"))
    num_train = _nearest_border(ordered, round(num_rows * config.train_split_ratio), first_group, last_group)
    num_test = round((num_rows - num_train) * config.val_test_split_ratio)
    at_least = num_train
    if config.val_test_split_ratio < 1.0:
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
