"""What SIGINT and SIGTERM do to a verb: end it in order, or ask a training to stop after its step."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import find_ending, iterate_metrics

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_REQUEST_S = 0.5


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers that the body replaces, as `ray.init` does with SIGTERM's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the body as Ctrl-C does, so that it can leave everything in order.

    Raises:
        SystemExit: SIGTERM came, and the body has ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt  # of a SystemExit, Ray's own calls lose the exit code

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received:
            sys.exit(128 + received[0])
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stopping_on_signals(
    run: RunDir, attempts_before: int, note: Callable[[str], None]
) -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into a request to stop, which `note` tells of; a second one ends the body.

    The first one ends the body, too, as long as the attempt after `attempts_before` has trained nothing that
    could be lost. Once that attempt has ended there is nothing to stop. Gives the signals that were heeded.
    """
    received: list[int] = []
    first_at = 0.0

    def request_stop(number: int, _: object) -> None:
        nonlocal first_at
        if find_ending(run, attempts_before) is not None:
            return
        # `timeout` and some schedulers signal the process and then its group: that is one request.
        if received and time.monotonic() - first_at < _SAME_REQUEST_S:
            return
        received.append(number)
        first_at = time.monotonic()
        if len(received) > 1 or not _has_trained(run, attempts_before):
            raise KeyboardInterrupt
        run.stop_path.touch()
        note("stopping after this step, with a checkpoint; once more to stop at once")

    with signal_handlers_kept():
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                signal.signal(number, request_stop)
        yield received


def _has_trained(run: RunDir, attempts_before: int) -> bool:
    lines = iterate_metrics(run.metrics_path)
    return any("loss" in line for line in lines if line["attempt"] > attempts_before)
