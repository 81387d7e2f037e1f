"""Folders that the processes of a Ray of our own work with: they stand elsewhere, and Ray's sockets need short names."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tunesmith.errors import ConfigError
from tunesmith.machine import LONGEST_SOCKET_BYTES

logger = logging.getLogger(__name__)

# Where Hugging Face's libraries and torch keep what they fetch.
_CACHES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_ASSETS_CACHE",
    "HF_XET_CACHE",
    "HF_MODULES_CACHE",
    "HF_DATASETS_CACHE",
    "HF_TOKEN_PATH",
    "TRANSFORMERS_CACHE",
    "XDG_CACHE_HOME",
    "TORCH_HOME",
)
_SYSTEM_FOLDER = "/tmp"


def make_caches_absolute() -> None:
    """Let variables that name caches by relative paths mean the same in Ray's processes, which start elsewhere."""
    for name in _CACHES:
        if value := os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expandvars(os.path.expanduser(value)))


def choose_temp_dir() -> str | None:
    """Return the folder for Ray's sessions in place of its own choice; None where that will do.

    Raises:
        ConfigError: the folder that was chosen for Ray is too long for its sockets, or no short one can be written.
    """
    for name in ("RAY_TMPDIR", "TMPDIR"):  # in Ray's order
        if not (folder := os.environ.get(name)):
            continue
        size = len(os.fsencode(_socket_below(folder)))
        if size <= LONGEST_SOCKET_BYTES:
            return None
        most = len(os.fsencode(folder)) - (size - LONGEST_SOCKET_BYTES)
        message = f"`{name}` is `{folder}`: too long for the names of Ray's sockets, by {size - LONGEST_SOCKET_BYTES} bytes"
        if name == "RAY_TMPDIR" or not os.access(_SYSTEM_FOLDER, os.W_OK | os.X_OK):
            raise ConfigError(message, f"set RAY_TMPDIR to a folder whose path has at most {most} bytes")
        logger.info(
            "%s; Ray's sessions go to `%s` (RAY_TMPDIR names another folder)", message, _SYSTEM_FOLDER
        )
        return f"{_SYSTEM_FOLDER}/ray"
    return None


def _socket_below(folder: str) -> str:
    """Return the longest of the socket names that Ray makes."""
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    return str(Path(folder, "ray", session, "sockets", "plasma_store.10"))
