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
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from tunesmith.config import HFDatasetConfig, TrainConfig
from tunesmith.config.data import OwnSet
from tunesmith.data.formats import RenderedRow, RowFormat, choose_format
from tunesmith.data.formats.base import is_missing, list_columns
from tunesmith.data.mixture import dataset_of, tag, without_tag
from tunesmith.data.sampling import FirstOfShuffle
from tunesmith.data.sides import LEFT_OUT, SETS, Written, choose_sides, count_overlap
from tunesmith.data.sources import describe_source, find_shared, local_path, read_rows
from tunesmith.data.split_names import split_of_name
from tunesmith.errors import DataError

logger = logging.getLogger(__name__)

# No format's rows are told by this alone: a group's hash is never a row's.
_GROUP = "group_by"
_CHECKED_ROWS = 100
_PROGRESS_S = 10.0

T = TypeVar("T")


def check_sources(config: TrainConfig) -> list[RowFormat]:
    """Choose the row format of each of `config.sources`, and try it on the first rows; cheap, to refuse bad input early.

    Raises:
        ConfigError: a malformed template.
        DataError: a data set is absent, empty or malformed, or a column is missing.
    """
    return [
        *(_check_source(settings) for settings in config.data_sets),
        *(_check_own_set(config.data_sets, own) for own in config.own_sets),
    ]


def _check_own_set(data_sets: Sequence[HFDatasetConfig], own: OwnSet) -> RowFormat:
    """Check what is read in place of a part of the split."""
    try:
        row_format = _check_source(own.settings)
    except DataError as error:
        raise DataError(
            f"the {own.part} set: {error.message}",
            f"{error.hint}; {own.part}_dataset names the set, {own.part}_split its split",
        ) from error
    if own.number is not None and getattr(data_sets[own.number], f"{own.part}_dataset") is None:
        check_other_split(data_sets[own.number], own.settings.split, f"{own.part}_split")
    return row_format


def check_other_split(settings: HFDatasetConfig, split: str, setting: str) -> None:
    """Refuse a split that can't be another one of the data set.

    Raises:
        DataError: it holds rows that are trained on, by whatever name, or the data set is a file of one split.
    """
    path = local_path(settings)
    if path is None:
        if split == settings.split:
            raise DataError(f"`{setting}` is `{split}`, which is trained on", "name another split")
        return
    shared = find_shared(settings, settings.model_copy(update={"split": split}))
    if shared is None:
        return
    file, key = shared
    other_set = f"--{setting.removesuffix('_split')}_dataset"
    if path.is_file() and split_of_name(key or "") is None:
        raise DataError(
            f"`{setting}` names another split of `{settings.dataset_name}`, which is one file and has none",
            f"give the other file: {other_set}",
        )
    raise DataError(
        f"`{setting}` is `{split}`, which is trained on: `{file}` holds rows of split `{settings.split}`",
        f"name another split, name the files after their splits, or give another set: {other_set}",
    )


def _check_source(settings: HFDatasetConfig) -> RowFormat:
    rows = read_rows(settings)
    where, first = next(rows)
    row_format = choose_format(settings, first, describe_source(settings))
    row_format.render(first, where)
    columns = dict(first)
    for where, row in islice(rows, _CHECKED_ROWS - 1):
        row_format.render(row, where)
        columns.update(row)
    if settings.group_by is not None and settings.group_by not in columns:
        raise DataError(
            f"`group_by` names column `{settings.group_by}`, absent from {describe_source(settings)}",
            list_columns(columns),
        )
    return row_format


class SplitCounts(NamedTuple):
    """The rows of each set; of those whose rows may be in the training set too how many are; and what the log says."""

    rows: dict[str, int]
    overlap: dict[str, int]
    notes: list[str]

    @property
    def told(self) -> dict[str, Any]:
        """What is recorded besides the rows: nothing where there is nothing to tell."""
        return {name: value for name in ("overlap", "notes") if (value := getattr(self, name))}

    @classmethod
    def read(cls, recorded: dict[str, Any]) -> SplitCounts:
        """Return what was recorded."""
        return cls(recorded["rows"], recorded.get("overlap", {}), recorded.get("notes", []))


def write_split(config: TrainConfig, formats: Sequence[RowFormat], folder: Path) -> SplitCounts:
    """Write the three sets into `folder`, in the order of the sources, and count their rows.

    Holds 16 bytes a row. An empty set is an empty file. Rows beyond a data set's `max_rows` are in none.

    Raises:
        DataError: a row is malformed; the message names it.
    """
    everything = folder / "rows.jsonl"
    with everything.open("wb") as stream:
        written = [
            _write_rendered(stream, settings, row_format, config.seed, tag(i, len(formats)))
            for i, (settings, row_format) in enumerate(zip(config.sources, formats, strict=True))
        ]
    number = len(config.data_sets)
    sides = choose_sides(written[:number], config.data_sets, config.own_sets)
    if config.own_sets:
        own = zip(written[number:], config.own_sets, strict=True)
        given = [np.full(len(it.hashes), SETS.index(part), np.uint8) for it, (_, part, _) in own]
        sides = np.concatenate([sides, *given])
    counts = {name: int((sides == side).sum()) for side, name in enumerate(SETS)}
    overlap = count_overlap(written, sides, _find_leaky(config))
    files = [(folder / f"{name}.jsonl").open("wb") for name in SETS]
    try:
        with everything.open("rb") as lines:
            for line, side in zip(lines, sides.tobytes(), strict=True):
                if side != LEFT_OUT:
                    files[side].write(line)
    finally:
        for file in files:
            file.close()
    everything.unlink()
    return SplitCounts(counts, overlap, [note for it in written for note in it.notes])


def _find_leaky(config: TrainConfig) -> list[int]:
    """Return the numbers of the sets that may hold rows of the training set: what is split by the rows doesn't."""
    if any(settings.group_by is not None for settings in config.data_sets):
        return [*range(1, len(SETS))]
    return sorted({SETS.index(own.part) for own in config.own_sets})


def _write_rendered(
    stream: BinaryIO, settings: HFDatasetConfig, row_format: RowFormat, seed: int, tagged: dict[str, int]
) -> Written:
    """Write the rendered rows of a data set, of which those beyond `max_rows` don't count."""
    hashes, groups = array("Q"), array("Q")
    is_grouped = bytearray()
    first = FirstOfShuffle(settings.max_rows, seed)
    for where, row in with_progress(read_rows(settings), "read"):
        if not first.admits():
            continue
        rendered = row_format.render(row, where)
        stream.write(_dump({**rendered, **tagged}, where, sort_keys=False) + b"\n")
        hashes.append(_hash(row_format.split_key(rendered), seed, where))
        if settings.group_by is not None:
            value = _value_of_group(row.get(settings.group_by))
            is_grouped.append(value is not None)
            groups.append(hashes[-1] if value is None else _hash({_GROUP: value}, seed, where))
    is_taken = first.chosen()
    of_rows = np.frombuffer(hashes, dtype=np.uint64)
    taken = slice(None) if is_taken is None else is_taken
    notes, source = [], describe_source(settings)
    if settings.max_rows is not None:
        notes.append(f"{source}: {len(of_rows[taken]):,} of its {first.num_seen:,} rows, by max_rows")
    if settings.group_by is None:
        return Written(of_rows, of_rows, is_taken, notes)
    of_groups, has_group = np.frombuffer(groups, np.uint64), np.frombuffer(is_grouped, np.bool_)[taken]
    num_groups, num_alone = len(np.unique(of_groups[taken][has_group])), int((~has_group).sum())
    alone = f"; {num_alone:,} rows without one stand for themselves" if num_alone else ""
    groups_of = "1 group" if num_groups == 1 else f"{num_groups:,} groups"
    notes.append(f"{source}: {groups_of} of rows by `{settings.group_by}`{alone}")
    return Written(of_rows, of_groups, is_taken, notes)


def _hash(content: Any, seed: int, where: str) -> int:
    """Return a hash of 64 bits, of the seed too."""
    key = seed.to_bytes(8, "little")
    canonical = _dump(content, where, sort_keys=True)
    return int.from_bytes(blake2b(canonical, digest_size=8, key=key).digest(), "little")


def _value_of_group(value: Any) -> Any:
    """Return what a row's group is told by; None if the row has none, and stands for itself."""
    if is_missing(value) or value == "":
        return None
    if isinstance(value, list | dict):
        return value
    # A gap in the column turns whole numbers into floats; other files hold them as text.
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def locate(config: TrainConfig, formats: Sequence[RowFormat], rendered: RenderedRow) -> str:
    """Return the name of the first source row that renders to `rendered`, for an error."""
    settings, row_format = config.sources[dataset_of(rendered)], formats[dataset_of(rendered)]
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
