"""A Ray of our own on this machine, and the signal handlers that Ray would replace."""

from __future__ import annotations

import logging
import signal
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
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
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
