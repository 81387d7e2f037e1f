"""A Ray of our own on this machine, and signals beside Ray, which replaces their handlers."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def ray_at_hand(num_cpus: int) -> Iterator[None]:
    """Start a Ray with `num_cpus` CPUs on this machine and end it, unless this process is connected to one."""
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with signal_handlers_kept():
            # "local": else Ray would join the cluster last started on this machine, dead or alive.
            ray.init(
                "local",
                num_cpus=num_cpus,
                include_dashboard=False,  # its processes take the CPUs that are to train
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
                # Ray Train's actors have environments of their own: processes started ahead of them are no use to
                # them, and their first imports take the CPUs.
                _system_config={"prestart_worker_first_driver": False},
            )
        yield
    finally:
        ray.shutdown()


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put back the handlers that the body replaces, as `ray.init` does with SIGTERM's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
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
