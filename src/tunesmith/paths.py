"""Paths as a person gives them: with variables, of a home folder that isn't known, too long, or not theirs to look at."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from tunesmith.errors import ConfigError

LONGEST_NAME_BYTES = 255  # of ext4, XFS, NFS, Lustre and the others
LONGEST_PATH_BYTES = 4095

_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<braced>[^{}]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*)|(?P<open>\{))"
)


def expand_variables(path: str) -> str:
    """Return the path with `$NAME` and `${NAME}` replaced by the environment's; `$$` is a dollar.

    What is there as it is written means itself, such as a folder that has a dollar in its name.

    Raises:
        ValueError: a variable is unset or empty, or isn't one.
    """
    if "$" not in path or exists(expand_user(path)):
        return path
    return _VARIABLE.sub(_value_of, path)


def _value_of(found: re.Match[str]) -> str:
    if found["dollar"]:
        return "$"
    name = found["plain"] or found["braced"] or ""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"`{found[0]}` is no variable: write $NAME or ${{NAME}}, and $$ for a dollar")
    if not (value := os.environ.get(name)):
        state = "is empty" if name in os.environ else "isn't set"
        raise ValueError(f"the environment variable `{name}` {state}: set it, or write $$ for a dollar")
    return value


def expand(path: Path | str) -> Path:
    """Return the path with variables and `~` in it replaced.

    Raises:
        ConfigError: a variable is unset, or there is no such user.
    """
    try:
        return expand_user(expand_variables(str(path)))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"`{path}`: {error}", "write the whole path") from None


def expand_user(path: Path | str) -> Path:
    """Return the path with `~` and `~user` replaced by the home folder.

    Raises:
        ConfigError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"`{path}` begins with `{Path(path).parts[0]}`, and no such user's home folder is known here",
            "write the whole path",
        ) from None


def longest_name(path: Path) -> int:
    """Return the bytes that a name may have on the disk where `path` is, or will be: 255, but 143 on encrypted homes."""
    folder = path.absolute()
    while not exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except OSError:
        return LONGEST_NAME_BYTES


def count_bytes(path: Path | str) -> int:
    """Return the bytes of a path or a name on a disk; those of UTF-8, whatever the locale's encoding."""
    return len(_bytes_of(path))


def _bytes_of(path: Path | str) -> bytes:
    return str(path).encode("utf-8", "surrogateescape")


def find_long_name(path: Path, longest: int | None = None) -> str | None:
    """Return the part of a path that is longer than any disk's names, or than `longest` bytes; None without one."""
    longest = longest or LONGEST_NAME_BYTES
    return next((part for part in path.parts if count_bytes(part) > longest), None)


def shorten_name(name: str, longest: int) -> str:
    """Return a name of at most so many bytes: a longer one cut, with a digest of the whole at its end."""
    raw = _bytes_of(name)
    if len(raw) <= longest:
        return name
    digest = hashlib.blake2b(raw, digest_size=4).hexdigest()
    return f"{raw[: longest - len(digest) - 1].decode(errors='ignore')}-{digest}"


def exists(path: Path) -> bool:
    """Tell whether there is something at `path`; at what can't be a path, there is nothing.

    Raises:
        ConfigError: this user may not look.
    """
    return _mode_of(path) is not None


def is_file(path: Path) -> bool:
    """Tell whether `path` is a file; raises as `exists` does."""
    mode = _mode_of(path)
    return mode is not None and stat.S_ISREG(mode)


def is_dir(path: Path) -> bool:
    """Tell whether `path` is a folder; raises as `exists` does."""
    mode = _mode_of(path)
    return mode is not None and stat.S_ISDIR(mode)


def _mode_of(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except PermissionError:
        raise ConfigError(
            f"`{path}` can't be looked at: permission denied",
            "a folder that it lies in may not be entered by this user: chmod +x that folder, or give another path",
        ) from None
    except (OSError, ValueError):  # absent, too long, or with a null character
        return None
