"""What comes back from another process on Ray: its result, or an error that says what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import MISSING_PACKAGE_HINT, TunesmithError

_MAX_REASON_CHARACTERS = 300
_FAILED_IMPORT = re.compile(r"(ModuleNotFoundError|ImportError): .+")


@dataclass(frozen=True)
class Work:
    """What another process does, as its errors call it, and the classes of these errors."""

    name: str
    failed: type[TunesmithError]
    lost: type[TunesmithError]
    hint: str


def fetch(reference: Any, work: Work) -> Any:
    """Return what another process has made; raise an error of ours as it was raised there.

    Raises:
        work.lost: the process has died, or what it made is out of reach.
        work.failed: it failed.
    """
    import ray
    from ray.exceptions import (
        NodeDiedError,
        ObjectLostError,
        OutOfMemoryError,
        RayActorError,
        RayError,
        RayTaskError,
        WorkerCrashedError,
    )

    lost = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, TunesmithError):
            raise error.cause from error
        raise explain(error.cause, work) from error
    except RayError as error:
        # An actor that can't be read where it is to live counts as dead; it would never live.
        if not isinstance(error, lost) or find_failed_import(error):
            raise explain(error, work) from error
        # Of an actor's death the first line says no more than that.
        line = -1 if isinstance(error, RayActorError) else 0
        raise work.lost(f"a process on Ray has died: {_line(error, line)}", work.hint) from error


def explain(error: Exception, work: Work) -> TunesmithError:
    """Return what a library's error means for the work."""
    failed_import = find_failed_import(error)
    if failed_import is not None:
        return work.failed(f"{work.name} failed: {failed_import}", MISSING_PACKAGE_HINT)
    return work.failed(f"{work.name} failed: {type(error).__name__}: {_line(error, 0)}", work.hint)


def find_failed_import(error: BaseException) -> str | None:
    """Return the failed import that an error is, or that the traceback in its text ends with."""
    if isinstance(error, ImportError):
        return f"{type(error).__name__}: {error}"
    # Where a process couldn't even read its task, Ray hands over the text alone.
    found = _FAILED_IMPORT.fullmatch(_line(error, -1))
    return found[0] if found else None


def _line(error: BaseException, number: int) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[number].strip()[:_MAX_REASON_CHARACTERS]
