"""Rows from the hub, from JSONL, JSON, CSV or Parquet files, and from saved data sets.

Everything streams: no reader holds more than a batch of rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config import HFDatasetConfig
from tunesmith.data.arrow_rows import Row, iterate_rows
from tunesmith.data.files import BATCH_ROWS, READERS, Rows, list_files, open_rows
from tunesmith.errors import DataError


def read_rows(config: HFDatasetConfig) -> Rows:
    """Yield `(where, row)` for every row; `where` names the row in errors.

    Raises:
        DataError: the data set is absent, empty or malformed; the message names file and line.
    """
    path = local_path(config)
    if path is None:
        yield from _number(_read_hub(config), describe_source(config))
    elif _is_saved_dataset(path):
        yield from _number(_read_saved(path, config.split), describe_source(config))
    else:
        found = False
        for file in list_files(path, config.split):
            for item in READERS[file.suffix.lower()](file):
                found = True
                yield item
        if not found:
            raise DataError(
                f"{describe_source(config)} holds no rows", "give a data set with at least one row"
            )


def describe_source(config: HFDatasetConfig) -> str:
    """Return the data set's name as errors say it: `alpaca.jsonl` (train)."""
    path = local_path(config)
    name = config.dataset_name if path is None else path.name or str(path)
    subset = f"/{config.dataset_config}" if path is None and config.dataset_config else ""
    return f"`{name}{subset}` ({config.split})"


def local_path(config: HFDatasetConfig) -> Path | None:
    """Return the data set's path if it is local, None if it is a hub id. What exists on disk wins.

    Raises:
        DataError: the name looks like a path, and nothing is there.
    """
    name = config.dataset_name
    path = Path(name).expanduser()
    if path.exists():
        if re.search(r"[\[\]+]", config.split):
            raise DataError(
                f"split `{config.split}` slices a local data set: `{name}`",
                "name one split, as train; slices work for hub data sets",
            )
        return path
    if name.startswith((".", "/", "~")) or path.suffix.lower() in READERS:
        raise DataError(
            f"no such file or folder: `{name}`",
            f"it was looked for at `{path.absolute()}`; dataset_name is a hub id or a path",
        )
    return None


def source_fingerprint(config: HFDatasetConfig) -> str:
    """Return a digest of the rows' origin: of the files' content, or the hub's commit."""
    path = local_path(config)
    digest = hashlib.blake2b(digest_size=16)
    if path is None:
        for part in (config.dataset_name, config.dataset_config, config.split, _hub_builder(config).hash):
            digest.update(f"{part}\0".encode())
        return digest.hexdigest()
    files = _saved_files(path, config.split) if _is_saved_dataset(path) else list_files(path, config.split)
    for file in files:
        digest.update(f"{file.suffix.lower()}\0{file.stat().st_size}\0".encode())
        with open_rows(file) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def sources_fingerprint(data_sets: Sequence[HFDatasetConfig]) -> str:
    """Return a digest of where the rows of all these data sets come from."""
    fingerprints = [source_fingerprint(config) for config in data_sets]
    if len(fingerprints) == 1:
        return fingerprints[0]
    return hashlib.blake2b("\0".join(fingerprints).encode(), digest_size=16).hexdigest()


def _number(rows: Iterator[Row], name: str) -> Rows:
    count = 0
    for count, row in enumerate(rows, start=1):
        yield f"{name}, row {count}", row
    if count == 0:
        raise DataError(f"{name} holds no rows", "give a data set with at least one row")


# The hub and saved data sets.


def _hub_hint(config: HFDatasetConfig) -> str:
    return (
        f"tried the hub (revision {config.dataset_revision or 'main'}) and this machine's cache of it, as "
        f"`{Path(config.dataset_name).absolute()}` does not exist; check the name, dataset_config, split and the "
        "network (HF_HUB_OFFLINE must be unset to download; HF_TOKEN opens private data sets)"
    )


def _hub_builder(config: HFDatasetConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(
            config.dataset_name, config.dataset_config, revision=config.dataset_revision
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"can't load data set {describe_source(config)}: {_first_line(error)}", _hub_hint(config)
        ) from error


def _read_hub(config: HFDatasetConfig) -> Iterator[Row]:
    import datasets

    _hub_builder(config)
    try:
        loaded = datasets.load_dataset(
            config.dataset_name, config.dataset_config, split=config.split, revision=config.dataset_revision
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"can't load data set {describe_source(config)}: {_first_line(error)}", _hub_hint(config)
        ) from error
    yield from _read_arrow(loaded)


def _read_arrow(loaded: Any) -> Iterator[Row]:
    for table in loaded.with_format("arrow").iter(BATCH_ROWS):
        yield from iterate_rows(table)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _saved_folder(path: Path, split: str) -> Path:
    if not (path / "dataset_dict.json").is_file():
        return path
    splits = sorted(file.parent.name for file in path.glob("*/state.json"))
    if split not in splits:
        names = ", ".join(f"`{name}`" for name in splits)
        raise DataError(f"the saved data set `{path}` has no split `{split}`", f"its splits are {names}")
    return path / split


def _saved_files(path: Path, split: str) -> list[Path]:
    return sorted(_saved_folder(path, split).glob("*.arrow"))


def _read_saved(path: Path, split: str) -> Iterator[Row]:
    import datasets

    folder = _saved_folder(path, split)
    try:
        loaded = datasets.load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"can't read the saved data set `{folder}`: {_first_line(error)}",
            "save it again with save_to_disk",
        ) from error
    yield from _read_arrow(loaded)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
