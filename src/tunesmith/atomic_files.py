"""Files and folders that are either the old or the new ones, never half."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_TOKEN_LENGTH = 8


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is either the old or the new one, never half."""
    write_text(path, [json.dumps(content, indent=2, default=str), "\n"])


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file so that it is either the old or the new one, never half."""
    write_text(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Write a text file so that it is either the old or the new one, never half."""
    write_bytes(path, (part.encode() for part in parts))


def write_bytes(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file so that it is either the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Delete a folder such that no reader sees half of it."""
    removed = _beside(path, ".removed_")
    path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder, which takes the place of `path` when the body has ended without an error.

    Killed at any moment, it leaves the old folder or the new one, whole, for `repair_folder` to put right.
    Only one process at a time may call it for the same `path`.
    """
    repair_folder(path)
    folder = _beside(path)
    folder.mkdir()
    try:
        yield folder
        sync_files(folder)
        if path.exists():
            path.rename(_beside(path, ".removed_"))
        folder.rename(path)
    finally:
        repair_folder(path)


def repair_folder(path: Path) -> None:
    """Delete what `replace_folder` left beside `path` when it broke off; put the old folder back if `path` is gone."""
    token, name = "[0-9a-f]" * _TOKEN_LENGTH, glob.escape(path.name)
    for removed in list(path.parent.glob(f".removed_{name}_{token}")):
        if path.exists():
            removed.rename(_beside(path))  # half deleted, it must not be taken for whole
        else:
            logger.info("putting `%s` back: its replacement broke off", path)
            removed.rename(path)
    for unfinished in list(path.parent.glob(f".{name}_{token}")):
        shutil.rmtree(unfinished, ignore_errors=True)


def _beside(path: Path, prefix: str = ".") -> Path:
    """Return a new name beside `path`."""
    return path.with_name(f"{prefix}{path.name}_{uuid.uuid4().hex[:_TOKEN_LENGTH]}")


def sync_files(folder: Path) -> None:
    """Make sure that the folder's files are on the disk before the folder gets its name."""
    for path in [*(path for path in folder.rglob("*") if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
