"""Rows from the hub, from JSONL, JSON, CSV or Parquet files, and from saved data sets.

Everything streams: no reader holds more than a batch of rows.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.config import TrainConfig
from tunesmith.errors import DataError

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]

_BATCH_ROWS = 1000
_CHUNK_CHARS = 1 << 20
# An object that hasn't ended after this many characters is taken as malformed, not as long.
_LONGEST_OBJECT_CHARS = 1 << 26
# Files about a data set, which lie beside its rows.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "split.json"}


def read_rows(config: TrainConfig) -> Rows:
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
        for file in _files(path, config.split):
            for item in _READERS[file.suffix.lower()](file):
                found = True
                yield item
        if not found:
            raise DataError(f"{describe_source(config)} holds no rows", "give a data set with at least one row")


def describe_source(config: TrainConfig) -> str:
    """Return the data set's name as errors say it: `alpaca.jsonl` (train)."""
    path = local_path(config)
    name = config.dataset_name if path is None else path.name or str(path)
    subset = f"/{config.dataset_config}" if path is None and config.dataset_config else ""
    return f"`{name}{subset}` ({config.split})"


def local_path(config: TrainConfig) -> Path | None:
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
    if name.startswith((".", "/", "~")) or path.suffix.lower() in _READERS:
        raise DataError(
            f"no such file or folder: `{name}`",
            f"it was looked for at `{path.absolute()}`; dataset_name is a hub id or a path",
        )
    return None


def source_fingerprint(config: TrainConfig) -> str:
    """Return a digest of the rows' origin: of the files' content, or the hub's commit."""
    path = local_path(config)
    digest = hashlib.blake2b(digest_size=16)
    if path is None:
        for part in (config.dataset_name, config.dataset_config, config.split, _hub_builder(config).hash):
            digest.update(f"{part}\0".encode())
        return digest.hexdigest()
    files = _saved_files(path, config.split) if _is_saved_dataset(path) else _files(path, config.split)
    for file in files:
        digest.update(f"{file.suffix.lower()}\0{file.stat().st_size}\0".encode())
        with _open_error(file), file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _number(rows: Iterator[Row], name: str) -> Rows:
    count = 0
    for count, row in enumerate(rows, start=1):
        yield f"{name}, row {count}", row
    if count == 0:
        raise DataError(f"{name} holds no rows", "give a data set with at least one row")


# The hub and saved data sets.


def _hub_hint(config: TrainConfig) -> str:
    return (
        f"tried the hub (revision {config.dataset_revision or 'main'}) and this machine's cache of it, as "
        f"`{Path(config.dataset_name).absolute()}` does not exist; check the name, dataset_config, split and the "
        "network (HF_HUB_OFFLINE must be unset to download; HF_TOKEN opens private data sets)"
    )


def _hub_builder(config: TrainConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset_builder(
            config.dataset_name, config.dataset_config, revision=config.dataset_revision
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"can't load data set {describe_source(config)}: {_first_line(error)}", _hub_hint(config)
        ) from error


def _read_hub(config: TrainConfig) -> Iterator[Row]:
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
    for table in loaded.with_format("arrow").iter(_BATCH_ROWS):
        yield from table.to_pylist()


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
            f"can't read the saved data set `{folder}`: {_first_line(error)}", "save it again with save_to_disk"
        ) from error
    yield from _read_arrow(loaded)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Files.


def _files(path: Path, split: str) -> list[Path]:
    known = ", ".join(sorted(_READERS))
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise DataError(f"`{path}` has an unknown suffix", f"known are {known}")
        return [path]
    for folder in (path, path / "data"):
        files = sorted(
            file
            for file in folder.glob("*")
            if file.is_file() and file.suffix.lower() in _READERS and not _is_beside_rows(file)
        )
        if files:
            break
    else:
        raise DataError(f"the folder `{path}` holds no file of rows", f"known suffixes are {known}")
    of_split = [file for file in files if file.name.startswith(split)]
    if not of_split and split != "train":
        names = ", ".join(f"`{file.name}`" for file in files[:8])
        raise DataError(
            f"the folder `{path}` has no file of split `{split}`",
            f"a split's files begin with its name; the files are {names}",
        )
    return of_split or files


def _is_beside_rows(file: Path) -> bool:
    return file.name.startswith(".") or file.name in _NOT_ROWS


class _open_error:
    """Turns an operating-system error about `file` into a DataError."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise DataError(
                f"can't read `{self.file}`: {error.strerror or error}", "check the file and its permissions"
            ) from error


def _decoded_lines(file: Path) -> Iterator[str]:
    # Read as bytes, so that only a newline ends a line and an encoding error knows its line.
    with _open_error(file), file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"`{file}`, line {number} is not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}",
                    "convert the file to UTF-8, as with `iconv -f LATIN1 -t UTF-8`",
                ) from error


def _read_jsonl(file: Path) -> Rows:
    for number, line in enumerate(_decoded_lines(file), start=1):
        if line.isspace():
            continue
        where = f"`{file}`, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where} is not valid JSON: {error}", "each line must be one JSON object") from error
        yield where, _check_object(row, where)


def _check_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where} is a {type(row).__name__}, not an object", "each row must be one JSON object")
    return row


def _read_json(file: Path) -> Rows:
    first = next((line.lstrip() for line in _decoded_lines(file) if line.strip()), "")
    return _read_json_array(file) if first.startswith("[") else _read_jsonl(file)


def _read_json_array(file: Path) -> Rows:
    decoder = json.JSONDecoder()
    reader = _ArrayText(file)
    reader.expect("[")
    count = 0
    while reader.peek() != "]":
        if count:
            reader.expect(",")
        count += 1
        where = f"`{file}`, item {count} (line {reader.line})"
        reader.peek()
        yield where, _check_object(reader.decode(decoder, where), where)
    reader.expect("]")
    if rest := reader.peek():
        raise DataError(f"`{file}`, line {reader.line}: `{rest}` after the end of the array", "remove it")


class _ArrayText:
    """The text of a JSON array, read in chunks as the parser asks for it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.line = 1
        self._lines = _decoded_lines(file)
        self._text = ""
        self._at = 0

    def _extend(self) -> bool:
        parts, size = [self._text[self._at :]], 0
        for line in self._lines:
            parts.append(line)
            size += len(line)
            if size >= _CHUNK_CHARS:
                break
        self._text, self._at = "".join(parts), 0
        return size > 0

    def _skip(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def peek(self) -> str:
        """Return the next character that isn't white space, "" at the end of the file."""
        while True:
            match = re.compile(r"\s*").match(self._text, self._at)
            assert match is not None
            self._skip(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._extend():
                return ""

    def expect(self, character: str) -> None:
        """Step over `character`, after white space."""
        if (found := self.peek()) != character:
            got = f"`{found}`" if found else "the end of the file"
            raise DataError(
                f"`{self.file}`, line {self.line}: `{character}` expected, {got} found",
                "the file must be one JSON array of objects, or one JSON object a line",
            )
        self._skip(self._at + 1)

    def decode(self, decoder: json.JSONDecoder, where: str) -> Any:
        """Return the next JSON value."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                # The value may go on after this chunk.
                if len(self._text) - self._at < _LONGEST_OBJECT_CHARS and self._extend():
                    continue
                raise DataError(f"{where} is not valid JSON: {error}", "mend the file at this item") from error
            self._skip(end)
            return value


def _read_csv(file: Path) -> Rows:
    # The library's limit of 128 KiB a field is shorter than a long document.
    csv.field_size_limit(_LONGEST_OBJECT_CHARS)
    reader = csv.reader(_decoded_lines(file), strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        where = f"`{file}`, line {line}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{where} is not valid CSV: {error}", "mend the file at this line") from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = fields
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{where} has {len(fields)} fields, and the header has {len(header)}",
                "put fields that hold commas or newlines in double quotes",
            )
        yield where, dict(zip(header, fields, strict=True))


def _read_parquet(file: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    count = 0
    try:
        with _open_error(file), parquet.ParquetFile(file) as reader:
            for batch in reader.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    count += 1
                    yield f"`{file}`, row {count}", row
    except pyarrow.ArrowException as error:
        raise DataError(
            f"`{file}` is not a valid Parquet file: {_first_line(error)}", "write the file again"
        ) from error


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
