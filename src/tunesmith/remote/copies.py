"""Copies of what lies at addresses, fetched once.

A copy's folder is named after the address and what the server says of each file's content. So copies never change:
what has changed at its address becomes another copy, beside that of a run that still reads the first one.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.atomic_files import sync_files, write_json
from tunesmith.errors import TunesmithError
from tunesmith.locks import Lock, Timeout
from tunesmith.paths import expand_user
from tunesmith.remote.problems import ERRORS, Kind, explain, is_absent
from tunesmith.urls import name_of

# fsspec, which the listing imports, takes a while.
if TYPE_CHECKING:
    from tunesmith.remote.backend import Listing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Copies:
    """Where copies are kept, and those that were found there already."""

    root: Path
    found: dict[tuple[str, bool], Path] = field(default_factory=dict)


_KEPT: ContextVar[_Copies | None] = ContextVar("kept", default=None)


@contextmanager
def copies_in(home: Path | None) -> Iterator[None]:
    """Let `fetch` keep its copies under `home`, or without one in the user's cache; inside, an address is asked once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tunesmith"
    token = _KEPT.set(_Copies(expand_user(home or cache).absolute()))
    try:
        yield
    finally:
        _KEPT.reset(token)


def fetch(url: str, kind: Kind, weights: bool = True) -> Path:
    """Return the copy of a file or a folder, fetched unless there is one of what lies at the address now.

    Atomic: another process sees the whole copy or none, and of two that fetch at once the second waits for the first.
    Without `weights`, a model's files of weights are left out.

    Raises:
        DataError, ModelError: by `kind`: there is nothing, it can't be read, or the copy can't be written.
    """
    copies = _KEPT.get()
    if copies is None:
        with copies_in(None):
            return fetch(url, kind, weights)
    if (url, weights) not in copies.found:
        copies.found[url, weights] = _fetch(url, kind, weights, copies.root / kind)
    return copies.found[url, weights]


def check(url: str, kind: Kind) -> None:
    """Ask for what lies at an address, with the credentials of this machine, and log what it is.

    Raises:
        DataError, ModelError: by `kind`: there is nothing. What only can't be asked from here is logged.
    """
    from tunesmith.remote.backend import list_files

    try:
        listing = list_files(url)
    except Exception as error:  # whatever a backend raises
        if is_absent(error):
            raise explain(error, url, kind) from error
        logger.info("`%s` is left to the job: from here, %s", url, explain(error, url, kind).message)
        return
    if not listing.files:
        raise explain(FileNotFoundError(url), url, kind)
    logger.info("`%s` is there: %s", url, listing.describe())


def _fetch(url: str, kind: Kind, weights: bool, folder: Path) -> Path:
    listing = _ask(url, kind, weights)
    copy = _place(folder, url, listing.content()) / name_of(url)
    if listing.is_marked and copy.exists():
        logger.info("`%s` has not changed since it was fetched into `%s`", url, copy)
        return copy
    staged = folder / f".fetching-{_digest(url)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{_digest(url)}.lock", url):
            if listing.is_marked and copy.exists():
                return copy
            shutil.rmtree(staged, ignore_errors=True)  # what a killed attempt has left
            try:
                return _download(url, kind, weights, listing, staged)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(kind, folder, error) from error


def _download(url: str, kind: Kind, weights: bool, listing: Listing, staged: Path) -> Path:
    """Fetch into `staged`, which then takes its name among the copies; return the copy."""
    free = shutil.disk_usage(staged.parent).free
    if listing.num_bytes > free:
        reason = f"it needs {listing.num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise _cannot_write(kind, staged.parent, OSError(errno.ENOSPC, reason))
    logger.info("fetching `%s`: %s", url, listing.describe())
    targets = {path: staged / name_of(url) / path for path in listing.files}
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        listing.fetch(url, targets)
    except Exception as error:  # whatever a backend raises
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise explain(error, url, kind) from error
    sizes = {path: target.stat().st_size for path, target in targets.items()}
    is_whole = all(file.size in (None, sizes[path]) for path, file in listing.files.items())
    if not is_whole or _ask(url, kind, weights).content() != listing.content():
        raise ERRORS[kind](f"`{url}` has changed while it was fetched", "start again when it is complete")
    content = listing.content()
    if not listing.is_marked:
        content = {path: (sizes[path], _digest_file(target)) for path, target in targets.items()}
    place = _place(staged.parent, url, content)
    if not place.exists():
        write_json(staged / "source.json", {"url": url, "files": content})
        sync_files(staged)
        staged.rename(place)
    return place / name_of(url)


def _ask(url: str, kind: Kind, weights: bool) -> Listing:
    from tunesmith.remote.backend import list_files

    try:
        listing = list_files(url, weights)
    except Exception as error:  # whatever a backend raises
        raise explain(error, url, kind) from error
    if not listing.files:
        raise explain(FileNotFoundError(url), url, kind)
    return listing


def _place(folder: Path, url: str, content: Mapping[str, Any]) -> Path:
    return folder / f"fetched-{_digest(f'{url} {sorted(content.items())}')}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _alone(path: Path, url: str) -> Iterator[None]:
    lock = Lock(path, "give a --home on another disk, or XDG_CACHE_HOME where there is none")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that fetches `%s`", url)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _cannot_write(kind: Kind, folder: Path, error: OSError) -> TunesmithError:
    return ERRORS[kind](
        f"can't write what is fetched to `{folder}`: {error.strerror or error}",
        "check the folder's permissions and the free space, or set home to another folder",
    )
