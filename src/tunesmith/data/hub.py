"""Rows that the `datasets` library reads: of the hub, and of data sets that it saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.config import HFDatasetConfig
from tunesmith.data.arrow_rows import Row, iterate_rows
from tunesmith.data.content import PARQUET_BRANCH
from tunesmith.data.files import BATCH_ROWS
from tunesmith.errors import DataError

_SAYS_NOTHING = "An error occurred while generating the dataset"


def hub_commit(config: HFDatasetConfig, source: str) -> str:
    """Return what tells the hub's data set from its other versions; `source` names it in errors.

    Raises:
        DataError: whatever the library raises.
    """
    return str(_hub_builder(config, source).hash)


def read_hub(config: HFDatasetConfig, source: str) -> Iterator[Row]:
    """Yield the rows of a data set on the hub. Those of its CSV files are texts, as they are written.

    Raises:
        DataError: whatever the library raises.
    """
    import datasets

    builder = _hub_builder(config, source)
    with _told(config, source):
        loaded = datasets.load_dataset(
            config.dataset_name,
            config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
            **_as_written(builder),
        )
    yield from _read_arrow(loaded)


def _hub_builder(config: HFDatasetConfig, source: str) -> Any:
    import datasets

    with _told(config, source):
        return datasets.load_dataset_builder(
            config.dataset_name, config.dataset_config, revision=config.dataset_revision
        )


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
    as_text = datasets.Features({str(name): datasets.Value("string") for name in names})
    return {"features": as_text, "keep_default_na": False}


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
    said = lines[0] if lines else ""
    # What a KeyError says is a name alone.
    return (
        said
        if isinstance(error, OSError | ValueError | RuntimeError) and said
        else f"{type(error).__name__}: {said}".rstrip(": ")
    )


# Saved data sets.


def is_saved_dataset(path: Path) -> bool:
    """Tell whether `save_to_disk` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


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
        loaded = datasets.load_from_disk(folder)
    except Exception as error:  # of any class, as above
        raise DataError(
            f"can't read the saved data set `{folder}`: {_cause_of(error)}",
            "save it again with save_to_disk",
        ) from error
    yield from _read_arrow(loaded)


def _saved_folder(path: Path, split: str) -> Path:
    if not (path / "dataset_dict.json").is_file():
        return path
    splits = sorted(file.parent.name for file in path.glob("*/state.json"))
    if split not in splits:
        names = ", ".join(f"`{name}`" for name in splits)
        raise DataError(f"the saved data set `{path}` has no split `{split}`", f"its splits are {names}")
    return path / split


def _read_arrow(loaded: Any) -> Iterator[Row]:
    for table in loaded.with_format("arrow").iter(BATCH_ROWS):
        yield from iterate_rows(table)
