"""Rows that the `datasets` library reads: of the hub, and of data sets that it saved."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.config import HFDatasetConfig
from tunesmith.data.arrow_rows import Row, iterate_rows
from tunesmith.data.content import PARQUET_BRANCH
from tunesmith.data.files import BATCH_ROWS
from tunesmith.data.gaps import find_gapped, float_columns, without_points
from tunesmith.errors import DataError
from tunesmith.paths import is_file

_SHORT_CHARS = 40
_SAYS_NOTHING = "An error occurred while generating the dataset"


def hub_commit(config: HFDatasetConfig, source: str) -> str:
    """Return what tells the hub's data set from its other versions; `source` names it in errors.

    Raises:
        DataError: whatever the library raises.
    """
    with _told(config, source):
        opened = _open(config)
        return opened.name if isinstance(opened, Path) else str(opened.hash)


def read_hub(config: HFDatasetConfig, source: str) -> Iterator[Row]:
    """Yield the rows of a data set on the hub. Those of its CSV files are texts, as they are written.

    Raises:
        DataError: whatever the library raises.
    """
    import datasets

    with _told(config, source):
        opened = _open(config)
        if isinstance(opened, Path):
            loaded = _load_cached(opened, config.split)
        else:
            loaded = datasets.load_dataset(
                config.dataset_name,
                config.dataset_config,
                split=config.split,
                revision=config.dataset_revision,
                **_as_written(opened),
            )
    yield from _read_arrow(loaded, source)


def _open(config: HFDatasetConfig) -> Any:
    """Return the library's builder; without the hub, the folder of the cache that holds CSV files read as written."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = datasets.load_dataset_builder(
            config.dataset_name, config.dataset_config, revision=config.dataset_revision
        )
    except Exception:
        if (folder := _find_cached(config)) is None:
            raise
        return folder
    return (_find_cached(config) if isinstance(builder, Cache) else None) or builder


def _as_written(builder: Any) -> dict[str, Any]:
    """Return how CSV files are read without pandas' guesses, by which `NA` is nothing and `007` is 7."""
    import datasets
    from datasets.packaged_modules.csv import csv

    if not isinstance(builder.config, csv.CsvConfig):
        return {}
    file = next(iter(builder.config.data_files.values()))[0]
    local = datasets.DownloadManager().download_and_extract(file)
    options = {**builder.config.pd_read_csv_kwargs, "chunksize": None, "nrows": 0}
    names = csv.pd.read_csv(local, **options).columns
    return {
        "features": datasets.Features({str(name): datasets.Value("string") for name in names}),
        "keep_default_na": False,
    }


def _find_cached(config: HFDatasetConfig) -> Path | None:
    """Return the folder in the library's cache of CSV files that `_as_written` read, of the newest version.

    The library by itself finds there only what was read by its defaults.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *organization, name = config.dataset_name.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE, "___".join([*organization, camelcase_to_snakecase(name)]))
    begin = f"{config.dataset_config or 'default'}-"
    found = sorted(
        root.glob(f"{glob.escape(begin)}*/*/*/dataset_info.json"), key=lambda it: it.stat().st_mtime
    )
    for path in reversed(found):
        info = datasets.DatasetInfo.from_directory(str(path.parent))
        is_text = all(getattr(it, "dtype", None) == "string" for it in (info.features or {}).values())
        if info.builder_name == "csv" and is_text:
            return path.parent
    return None


def _load_cached(folder: Path, split: str) -> Any:
    import datasets
    from datasets.arrow_reader import ArrowReader

    info = datasets.DatasetInfo.from_directory(str(folder))
    reader = ArrowReader(str(folder), info)
    return datasets.Dataset(**reader.read(info.dataset_name, split, (info.splits or {}).values()))


@contextmanager
def _told(config: HFDatasetConfig, source: str) -> Iterator[None]:
    """Make one error with its cause of whatever the library raises, which is of any class."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"can't load data set {source}: {_cause_of(error)}", _hint_for(error, config)
        ) from error


def _hint_for(error: Exception, config: HFDatasetConfig) -> str:
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    if "scripts are no longer supported" in str(error):
        return f"it has a loading script, which isn't run; {PARQUET_BRANCH}"
    if isinstance(error, DatasetGenerationError | ArrowException):
        return (
            "its files hold what can't be read as one table: fetch them and give each by its path, or "
            f"{PARQUET_BRANCH}"
        )
    if isinstance(error, ImportError):
        return "install the package that its files need, or fetch them and give their path"
    if "Unknown split" in str(error):
        return "name another --split"
    return (
        f"tried the hub (revision {config.dataset_revision or 'main'}) and this machine's cache of it, as "
        f"`{Path(config.dataset_name).absolute()}` does not exist; check the name, dataset_config, split and the "
        "network (HF_HUB_OFFLINE must be unset to download; HF_TOKEN opens private data sets)"
    )


def _cause_of(error: BaseException) -> str:
    """Return the first line that says something, of the error or of what caused it."""
    while str(error).strip() in ("", _SAYS_NOTHING) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip() not in ("", _SAYS_NOTHING)]
    # "Config name is missing." has its list on the next line.
    said = " ".join(lines[: 2 if lines and len(lines[0]) < _SHORT_CHARS else 1])
    if said and isinstance(error, OSError | ValueError | RuntimeError):
        return said
    # What a KeyError says is a name alone.
    return f"{type(error).__name__}: {said}".rstrip(": ")


# Saved data sets.


def is_saved_dataset(path: Path) -> bool:
    """Tell whether `save_to_disk` wrote the folder."""
    return is_file(path / "dataset_dict.json") or is_file(path / "state.json")


def saved_files(path: Path, split: str) -> list[Path]:
    """Return the files of a split of a saved data set.

    Raises:
        DataError: there is no such split.
    """
    return sorted(_saved_folder(path, split).glob("*.arrow"))


def read_saved(path: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a split of a saved data set.

    Raises:
        DataError: there is no such split, or it can't be read.
    """
    import datasets

    folder = _saved_folder(path, split)
    try:
        if json.loads((folder / "state.json").read_text("utf-8")).get("_data_files") == []:
            return  # the library fails at a set without rows, which it saves without a file
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # of any class, as above
        raise DataError(
            f"can't read the saved data set `{folder}`: {_cause_of(error)}",
            "save it again with save_to_disk",
        ) from error
    yield from _read_arrow(loaded, f"`{folder.name}`")


def _saved_folder(path: Path, split: str) -> Path:
    if not (path / "dataset_dict.json").is_file():
        return path
    splits = sorted(file.parent.name for file in path.glob("*/state.json"))
    if split not in splits:
        names = ", ".join(f"`{name}`" for name in splits)
        raise DataError(f"the saved data set `{path}` has no split `{split}`", f"its splits are {names}")
    return path / split


def _read_arrow(loaded: Any, source: str) -> Iterator[Row]:
    loaded = loaded.with_format("arrow")
    floats = float_columns(loaded.features.arrow_schema)
    columns = loaded.select_columns(floats).iter(BATCH_ROWS) if floats else ()
    gapped = find_gapped(columns, source)
    for table in loaded.iter(BATCH_ROWS):
        yield from without_points(iterate_rows(table), gapped)
