"""The folder of a prepared data set: who may write into it, and when it is whole.

`split.json` comes last, so a folder without it holds no sets; a killed writer leaves `.preparing`, which the
next one clears.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.atomic_files import sync_files
from tunesmith.errors import DataError, LockError
from tunesmith.locks import Lock, Timeout
from tunesmith.paths import exists

logger = logging.getLogger(__name__)

_MANIFEST = "split.json"
_OTHER_FOLDER = "choose another data_dir, or remove this one if nothing needs it"


@dataclass
class DataFolder:
    """A folder held under its lock; `has_split` says that it holds whole sets of these settings."""

    path: Path
    settings: dict[str, Any]
    has_split: bool = False

    @property
    def staged(self) -> Path:
        """Where files are written before they are published."""
        return self.path / ".preparing"

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Make the staging folder, and remove it and what is left in it at the end."""
        self.staged.mkdir()
        try:
            yield
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        finally:
            shutil.rmtree(self.staged, ignore_errors=True)

    def row_counts(self) -> dict[str, int]:
        """Return the rows of each set."""
        counts: dict[str, int] = self.read_details()["rows"]
        return counts

    def read_details(self) -> dict[str, Any]:
        """Return what was published with the sets: their rows, and what else was told of them."""
        details: dict[str, Any] = json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))
        return details

    def publish(self, details: dict[str, Any] | None, sets: Sequence[str], tokens: Path) -> None:
        """Move the staged sets, if there are `details` of them (`rows`), and the staged `tokens` folder into place."""
        sync_files(self.staged)
        if details is not None:
            files = [f"{name}.jsonl" for name in sets]
            sizes = {name: (self.staged / name).stat().st_size for name in files}
            manifest = {"settings": self.settings, **details, "bytes": sizes}
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            (self.staged / _MANIFEST).write_text(text, encoding="utf-8")
            for name in [*files, _MANIFEST]:
                (self.staged / name).replace(self.path / name)
            self.has_split = True
        tokens.replace(self.path / tokens.name)


@contextmanager
def open_folder(path: Path, settings: dict[str, Any], moved_by: str = "home") -> Iterator[DataFolder]:
    """Hold `path` under its lock; an error leaves no folder behind that wasn't there before.

    `moved_by` is the setting that puts it elsewhere.

    Raises:
        DataError: the folder can't be written, or holds something else than sets of these settings.
        LockError: the disk has no locks.
    """
    created = [folder for folder in (path, *path.parents) if not exists(folder)]
    lock = Lock(path / ".lock", f"give a --{moved_by} on another disk")
    try:
        path.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
    except OSError as error:
        _remove_empty(created)
        raise _cannot_write(path, error) from error
    except LockError:
        lock.path.unlink(missing_ok=True)
        _remove_empty(created)
        raise
    folder = DataFolder(path, settings)
    try:
        _clear_torn(folder)
        folder.has_split = _check_content(folder)
        yield folder
    except BaseException:
        if not folder.has_split and not _entries(path):
            # Under the lock: who waits for it sees that the file is gone, and makes a new one.
            (path / ".lock").unlink(missing_ok=True)
            _remove_empty(created)
        raise
    finally:
        lock.release()


def _acquire(lock: Lock, path: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that prepares %s", path)
        while True:
            path.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout, FileNotFoundError):
                lock.acquire(timeout=5)
                return


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"can't write the prepared data to `{path}`: {error.strerror or error}",
        "check the folder's permissions and the free space, or set home or data_dir to another folder",
    )


def _entries(path: Path) -> list[str]:
    """What a person would see in the folder; file systems and shells put dot files where they like."""
    return sorted(
        entry.name for entry in path.iterdir() if entry.name[0] != "." and entry.name != "lost+found"
    )


def _clear_torn(folder: DataFolder) -> None:
    if not folder.staged.exists():
        return
    logger.info("clearing what an earlier attempt left in %s", folder.path)
    if not (folder.path / _MANIFEST).exists():
        for name in _entries(folder.path):
            if name.endswith(".jsonl"):
                (folder.path / name).unlink()
    shutil.rmtree(folder.staged)


def _check_content(folder: DataFolder) -> bool:
    path = folder.path
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if entries := _entries(path):
            raise DataError(
                f"`{path}` is not empty, and holds no prepared data: `{entries[0]}`", _OTHER_FOLDER
            ) from None
        return False
    if manifest["settings"] != folder.settings:
        names = [name for name, value in folder.settings.items() if manifest["settings"].get(name) != value]
        raise DataError(
            f"`{path}` holds data prepared with other settings: {', '.join(names)}",
            _OTHER_FOLDER,
        )
    for name, size in manifest["bytes"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise DataError(f"`{file}` was changed or removed since it was prepared", _OTHER_FOLDER)
    return True
