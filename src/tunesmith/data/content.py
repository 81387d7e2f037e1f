"""What a file is, by its name and by how it begins: rows that can be read, or something that is told by its name."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from tunesmith.data.packed import PACKED_SUFFIXES, is_packed, open_unpacked
from tunesmith.errors import DataError

# How rows are read from files of a suffix.
KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
}
PARQUET_BRANCH = "take its Parquet branch: dataset_revision: refs/convert/parquet"
_UNPACK = ("an archive", "unpack it, and give the file or the folder that comes out of it")
_SPREADSHEET = ("a spreadsheet", "save it as CSV in UTF-8")
_ARROW = (
    "an Arrow file",
    "give the folder that save_to_disk wrote, or write a Parquet file: Dataset.from_file(…).to_parquet(…)",
)
_AS_LINES = "write the rows as JSON lines: one object a line, in a file named .jsonl"
_PYTHON = ("a file of Python objects", _AS_LINES)
_DATABASE = ("a database", _AS_LINES)
# What people give that isn't rows, and what they can do about it.
_TOLD = {
    ".txt": ("plain text, which has no rows", 'write each text as a JSON line, {"text": "…"}, in rows.jsonl'),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), _SPREADSHEET),
    **dict.fromkeys((".arrow", ".feather"), _ARROW),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz"), _PYTHON),
    **dict.fromkeys((".sqlite", ".db"), _DATABASE),
    **dict.fromkeys((".xml", ".yaml", ".yml", ".orc", ".avro"), ("of a format that isn't read", _AS_LINES)),
    ".py": ("a script, and a script is no data set", f"give its rows as a file; of a hub data set, {PARQUET_BRANCH}"),
}  # fmt: skip
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD_BYTES = 4096
_JSON = re.compile(r'\s*(\{\s*("|$)|\[\s*(\{|$))')


def suffix_of(file: Path) -> str:
    """Return the suffix that tells the format, in small letters: `.jsonl` of `rows.JSONL` and of `rows.jsonl.gz`."""
    if file.suffix.lower() in PACKED_SUFFIXES:
        return Path(file.stem).suffix.lower()
    return file.suffix.lower()


def holds_rows(file: Path) -> bool:
    """Tell by its name whether `file` can be read as rows."""
    return suffix_of(file) in KINDS


def is_data_name(file: Path) -> bool:
    """Tell whether the name ends as that of a file, of rows or of what people give in place of rows."""
    suffixes = {suffix_of(file), file.suffix.lower()}
    return bool(suffixes & (KINDS.keys() | _TOLD.keys() | PACKED_SUFFIXES))


def explain_name(file: Path) -> tuple[str, str]:
    """Return what a file that can't be read as rows is by its name, and what to do about it."""
    known = ", ".join(sorted(KINDS))
    if suffix_of(file) in _TOLD:
        return _TOLD[suffix_of(file)]
    if file.suffix.lower() in PACKED_SUFFIXES:
        return (
            f"packed, and its name doesn't tell as what: it has an unknown suffix before {file.suffix}",
            f"name it as rows.jsonl{file.suffix}; known are {known}",
        )
    return "of an unknown suffix", f"known are {known}, packed as {', '.join(sorted(PACKED_SUFFIXES))} too"


def kind_of(file: Path) -> str:
    """Return how the rows of `file` are read: a value of `KINDS`, by its content where that leaves no doubt.

    Raises:
        DataError: it is something else than its name says, and no rows.
    """
    with open_unpacked(file) as stream:
        head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    if told := _explain_content(head):
        raise DataError(f"`{file}` is {told[0]}", told[1])
    named = KINDS[suffix_of(file)]
    if head.startswith(b"PAR1"):
        if is_packed(file):
            raise DataError(
                f"`{file}` is a packed Parquet file", "unpack it: Parquet is compressed in itself"
            )
        return "Parquet"
    if _JSON.match(head.decode(encoding_of(head) or "utf-8", errors="ignore")):
        return "JSON"
    if named == "Parquet" and head:
        raise DataError(
            f"`{file}` is not a valid Parquet file: it begins with {head[:8]!r}",
            "fetch or write the file again",
        )
    return named


def encoding_of(head: bytes) -> str | None:
    """Return the encoding that a byte order mark tells, None without one."""
    return next((encoding for mark, encoding in _ENCODINGS if head.startswith(mark)), None)


def _explain_content(head: bytes) -> tuple[str, str] | None:
    """Return what a file is that begins so, and what to do about it; None if it may hold rows."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file itself", "fetch the file: `git lfs pull` in its repository"
    if head.startswith(b"PK\x03\x04"):
        return "a ZIP archive or a spreadsheet", f"{_UNPACK[1]}; save a spreadsheet as CSV"
    if head[257:262] == b"ustar":
        return _UNPACK
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _ARROW
    if head.startswith(b"SQLite format 3"):
        return _DATABASE
    if re.match(rb"\s*<(!doctype html|html|head)", head.removeprefix(codecs.BOM_UTF8), re.IGNORECASE):
        return (
            "a web page, not the file itself",
            "fetch the file again, by its own address: on the hub …/resolve/… rather than …/blob/…",
        )
    if encoding_of(head) or head.startswith(b"PAR1") or 0 not in head[:64]:
        return None
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        if head[first:64:2].count(0) * 2 > len(head[first:64:2]):
            return (
                f"text in {encoding} without a byte order mark",
                f"convert it: `iconv -f {encoding} -t UTF-8`",
            )
    return "no text: it holds NUL bytes", _AS_LINES
