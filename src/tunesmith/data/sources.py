"""Rows from the hub, from JSON, CSV or Parquet files, and from saved data sets.

Everything streams: no reader holds more than a batch of rows.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunesmith.config import HFDatasetConfig
from tunesmith.data.arrow_rows import Row, Rows
from tunesmith.data.content import explain_name, is_data_name, kind_of, suffix_of
from tunesmith.data.files import read_file
from tunesmith.data.folders import describe_listing, list_files, list_files_of_first_version
from tunesmith.data.hub import hub_commit, is_saved_dataset, read_hub, read_saved, saved_files
from tunesmith.data.json_rows import find_holder
from tunesmith.data.packed import open_file
from tunesmith.errors import DataError
from tunesmith.paths import exists, expand_user
from tunesmith.remote.copies import fetch
from tunesmith.urls import is_url


def read_rows(config: HFDatasetConfig) -> Rows:
    """Yield `(where, row)` for every row; `where` names the row in errors.

    Raises:
        DataError: the data set is absent, empty or malformed; the message names file and line.
    """
    path = local_path(config)
    source = describe_source(config)
    if path is None:
        yield from _number(read_hub(config, source), source)
    elif is_saved_dataset(path):
        yield from _number(read_saved(path, config.split), source)
    else:
        found = False
        for file in files_of(config):
            for item in read_file(file, config.split):
                found = True
                yield item
        if not found:
            raise DataError(f"{source} holds no rows", "give a data set with at least one row")


def files_of(config: HFDatasetConfig) -> list[Path]:
    """Return the files that hold the rows of a local data set; of one on the hub, none.

    Raises:
        DataError: there are none, or which are meant is in doubt.
    """
    path = local_path(config)
    if path is None:
        return []
    return saved_files(path, config.split) if is_saved_dataset(path) else list_files(path, config.split).read


def find_shared(one: HFDatasetConfig, other: HFDatasetConfig) -> tuple[Path, str | None] | None:
    """Return the first file of which both read the same rows, and the key under which those lie in it.

    Raises:
        DataError: as `files_of` does.
    """
    of_one = {os.path.realpath(file) for file in files_of(one)}
    for file in files_of(other):
        if os.path.realpath(file) in of_one:
            key = _key_of_rows(file, other.split)
            if key == _key_of_rows(file, one.split):
                return file, key
    return None


def _key_of_rows(file: Path, split: str) -> str | None:
    is_json = suffix_of(file) != ".arrow" and kind_of(file) == "JSON"  # saved data sets are Arrow
    return find_holder(file, split) if is_json else None


def describe_doubles(data_sets: Sequence[HFDatasetConfig]) -> list[str]:
    """Return a line for each data set that reads rows which one before it reads too."""
    lines: list[str] = []
    first_by_place: dict[tuple[str, str | None], int] = {}
    for number, config in enumerate(data_sets if len(data_sets) > 1 else []):
        for file in files_of(config):
            place = os.path.realpath(file), _key_of_rows(file, config.split)
            first = first_by_place.setdefault(place, number)
            if first != number:
                lines.append(
                    f"`{file}` is read twice, as `{data_sets[first].dataset_name}` and as `{config.dataset_name}`: "
                    "its rows count twice; `weight` does so on purpose"
                )
                break
    return lines


def describe_source(config: HFDatasetConfig) -> str:
    """Return the data set's name as errors say it: `alpaca.jsonl` (train)."""
    path = local_path(config)
    name = config.dataset_name if path is None else path.name or str(path)
    subset = f"/{config.dataset_config}" if path is None and config.dataset_config else ""
    return f"`{name}{subset}` ({config.split})"


def describe_files(config: HFDatasetConfig) -> list[str]:
    """Return which files of a folder are read, which aren't and why, and where in its file a list of rows lies."""
    path = local_path(config)
    if path is None or is_saved_dataset(path):
        return []
    listing = list_files(path, config.split)
    lines = describe_listing(listing, path) if path.is_dir() else []
    first = listing.read[0]
    if (key := _key_of_rows(first, config.split)) is not None:
        lines.append(f"rows are those under `{key}` in `{first.name}`")
    return [f"{describe_source(config)}: {line}" for line in lines]


def local_path(config: HFDatasetConfig) -> Path | None:
    """Return the data set's path if it is local, None if it is a hub id. What exists on disk wins.

    Of an address it is that of its copy, fetched if need be.

    Raises:
        DataError: the name looks like a path or an address, and nothing is there.
    """
    name = config.dataset_name
    path = fetch(name, "datasets") if is_url(name) else expand_user(name)
    if exists(path):
        if re.search(r"[\[\]+]", config.split):
            raise DataError(
                f"split `{config.split}` slices a local data set: `{name}`",
                "name one split, as train; slices work for hub data sets",
            )
        return path
    if name.startswith((".", "/", "~")) or is_data_name(path):
        hint = f"it was looked for at `{path.absolute()}`; dataset_name is a hub id or a path"
        if suffix_of(path) == ".py":
            hint += f"; it is named as {', '.join(explain_name(path)[:1])}: {explain_name(path)[1]}"
        raise DataError(f"no such file or folder: `{name}`", hint)
    return None


def source_fingerprint(config: HFDatasetConfig, rendering_version: int | None = None) -> str:
    """Return a digest of the rows' origin: of the files' content, or the hub's commit.

    `rendering_version` is that of a run; of the first one, the files of a folder are those that it read then.
    """
    path = local_path(config)
    if path is None:
        commit = hub_commit(config, describe_source(config))
        parts = (config.dataset_name, config.dataset_config, config.split, commit)
        return hashlib.blake2b("".join(f"{part}\0" for part in parts).encode(), digest_size=16).hexdigest()
    if rendering_version == 1 and not is_saved_dataset(path):
        return _digest_files(list_files_of_first_version(path, config.split), [])
    files = files_of(config)
    held = [
        find_holder(file, config.split)
        for file in files
        if file.suffix != ".arrow" and kind_of(file) == "JSON"
    ]
    return _digest_files(files, [key for key in held if key is not None])


def sources_fingerprint(data_sets: Sequence[HFDatasetConfig], rendering_version: int | None = None) -> str:
    """Return a digest of where the rows of all these data sets come from; `rendering_version` as above."""
    fingerprints = [source_fingerprint(config, rendering_version) for config in data_sets]
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.blake2b("\0".join(fingerprints).encode(), digest_size=16).hexdigest()


def _digest_files(files: Sequence[Path], keys: Sequence[str]) -> str:
    """Return a digest of what the files hold, and of the keys under which their rows lie."""
    digest = hashlib.blake2b("".join(f"{key}\0" for key in keys).encode(), digest_size=16)
    for file in files:
        with open_file(file) as stream:
            digest.update(f"{file.suffix.lower()}\0{os.fstat(stream.fileno()).st_size}\0".encode())
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _number(rows: Iterator[Row], name: str) -> Rows:
    count = 0
    for count, row in enumerate(rows, start=1):
        yield f"{name}, row {count}", row
    if count == 0:
        raise DataError(f"{name} holds no rows", "give a data set with at least one row")
