"""What comes back from other processes on Ray: their result, or the error that matters."""

from __future__ import annotations

from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.failures import Work, explain, find_failed_import, line_of


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
        raise work.lost(f"a process on Ray has died: {line_of(error, line)}", work.hint) from error


def first_cause(failure: BaseException) -> BaseException:
    """Return the error that a failed group of Ray Train's workers began with; Ray wraps it several times."""
    failures = list(getattr(failure, "worker_failures", {}).values()) or [failure]
    return min((_root_of(error) for error in failures), key=_remoteness)


def _root_of(error: BaseException) -> BaseException:
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    return error


def _remoteness(error: BaseException) -> int:
    """Return how far from the cause an error is: a worker that lost its peer only shows a symptom."""
    if isinstance(error, TunesmithError):
        return 0
    return 2 if any(word in str(error) for word in ("gloo", "NCCL", "Connection")) else 1
