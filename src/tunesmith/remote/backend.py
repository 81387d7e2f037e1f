"""What lies at an address, and its way here: the only import of fsspec."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback, NoOpCallback

from tunesmith.urls import scheme_of

logger = logging.getLogger(__name__)

# What tells one content from another, as the backends call it.
_MARKS = (
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "Content-MD5",
    "Digest",
    "Last-Modified",
    "LastModified",
    "updated",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
_CONNECT_S, _SILENT_S, _PROGRESS_S = 10.0, 60.0, 10.0


@dataclass(frozen=True)
class File:
    """A file at an address: the backend's name for it, its bytes, and a mark that changes with its content.

    Size and mark are None where the server doesn't tell them.
    """

    key: str
    size: int | None
    mark: str | None


@dataclass(frozen=True)
class Listing:
    """What lies at an address: one file under the name `""`, or a folder's files by their paths in it."""

    backend: Any
    files: Mapping[str, File]

    @property
    def num_bytes(self) -> int:
        return sum(file.size or 0 for file in self.files.values())

    @property
    def is_marked(self) -> bool:
        """Whether another content of any file would show."""
        return all(file.mark is not None for file in self.files.values())

    def content(self) -> dict[str, tuple[int | None, str | None]]:
        return {path: (file.size, file.mark) for path, file in sorted(self.files.items())}

    def fetch(self, url: str, targets: Mapping[str, Path]) -> None:
        """Write each file to its target by path, and log now and then how much has come.

        Raises:
            Exception: whatever the backend raises.
        """
        keys = [self.files[path].key for path in targets]
        # The hub's backend has bars of its own, and reads in small pieces if it is given another callback.
        progress = NoOpCallback() if scheme_of(url) == "hf" else _Progress(url, self.num_bytes)
        self.backend.get(keys, [str(target) for target in targets.values()], callback=progress)

    def describe(self) -> str:
        files = "1 file" if len(self.files) == 1 else f"{len(self.files):,} files"
        return f"{files}, {self.num_bytes / 1e6:,.1f} MB"


def list_files(url: str, weights: bool = True) -> Listing:
    """Ask for what lies at an address; without `weights`, a model's files of weights are left out.

    Raises:
        Exception: whatever the backend raises.
    """
    try:
        return _list_with(_connect(url), url, weights)
    except Exception as error:
        if scheme_of(url) != "s3" or type(error).__name__ != "NoCredentialsError":
            raise
        try:  # a public bucket
            return _list_with(_connect(url, anon=True), url, weights)
        except PermissionError:
            raise PermissionError("there are no credentials, and without them it is refused") from error


def _connect(url: str, **options: Any) -> Any:
    scheme = scheme_of(url)
    if scheme == "s3":
        options["config_kwargs"] = {"connect_timeout": _CONNECT_S}
    elif scheme in ("http", "https"):
        import aiohttp

        # By default a transfer has five minutes in all.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S)
        options["client_kwargs"] = {"trust_env": True, "timeout": timeout}  # proxies, ~/.netrc
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)


def _list_with(backend: Any, url: str, weights: bool) -> Listing:
    scheme = scheme_of(url)
    path = url if scheme in ("http", "https") else url[len(scheme) + 3 :].rstrip("/")
    whole = backend.info(path)
    if whole["type"] == "file":
        return Listing(backend, {"": _read_info(path, whole)})
    files = {}
    for key, info in backend.find(path, detail=True).items():
        parts = [part for part in key.removeprefix(whole["name"].rstrip("/")).split("/") if part]
        # Some tools mark a folder by an empty file whose name ends with a slash.
        if key.endswith("/") or not parts or any(part.startswith(".") for part in parts):
            continue
        if weights or not key.endswith(_WEIGHTS):
            files["/".join(parts)] = _read_info(key, info)
    return Listing(backend, files)


def _read_info(key: str, info: Mapping[str, Any]) -> File:
    return File(key, info.get("size"), next((str(info[name]) for name in _MARKS if info.get(name)), None))


class _Progress(Callback):
    """Logs now and then how much has come of what is fetched."""

    def __init__(self, url: str, num_bytes: int, whole: _Progress | None = None) -> None:
        super().__init__()
        self.url, self.num_bytes, self.whole = url, num_bytes, whole
        self.arrived, self.said = 0, time.monotonic()

    def branched(self, path_1: str, path_2: str, **kwargs: Any) -> _Progress:
        return _Progress(self.url, self.num_bytes, self)

    def relative_update(self, inc: int = 1) -> None:
        # The whole is told of files, its branches of bytes.
        if self.whole is None:
            return
        self.whole.arrived += inc
        if time.monotonic() - self.whole.said > _PROGRESS_S:
            self.whole.said = time.monotonic()
            of_all = f" of {self.num_bytes / 1e6:,.0f}" if self.num_bytes else ""
            logger.info("fetched %s%s MB of `%s`", f"{self.whole.arrived / 1e6:,.0f}", of_all, self.url)
