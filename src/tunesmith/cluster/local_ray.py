"""A Ray of our own on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.cluster.folders import choose_temp_dir, make_caches_absolute
from tunesmith.signals import signal_handlers_kept


@contextmanager
def ray_at_hand(num_cpus: int) -> Iterator[None]:
    """Start a Ray with `num_cpus` CPUs on this machine and end it, unless this process is connected to one.

    Raises:
        ConfigError: the folder for its sockets has too long a name.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    make_caches_absolute()
    temp_dir = choose_temp_dir()
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
                _temp_dir=temp_dir,
                # Ray Train's actors have environments of their own: processes started ahead of them are no use to
                # them, and their first imports take the CPUs.
                _system_config={"prestart_worker_first_driver": False},
            )
        yield
    finally:
        ray.shutdown()
