"""Paths as a person gives them: of a home folder that isn't known, too long, or not theirs to look at."""

from __future__ import annotations

import stat
from pathlib import Path

from tunesmith.errors import ConfigError


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
