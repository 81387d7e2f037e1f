"""What a tracker is: a copy of a run's metrics for people's dashboards. `metrics.jsonl` stays the record."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Mapping
from typing import Protocol

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir

logger = logging.getLogger(__name__)

PROJECT = "tunesmith"
"""Where runs are gathered in a tool that gathers them, unless the tool's own variable names another place."""


class Tracker(Protocol):
    """A copy of the metrics. It may raise anything, but in `check` a `ConfigError` alone.

    Making one opens it, on rank 0 of an attempt. `start_step` is the step of the checkpoint that the attempt goes
    on from, 0 without one: an earlier attempt may have logged later steps, which now come again.
    """

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None: ...

    @staticmethod
    def check(config: TrainConfig) -> None:
        """Check, before anything is written, that the tool can be used.

        Raises:
            ConfigError: its package or its key is missing, or its server can't be reached.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step, by their tags; a value may be NaN or infinite. It must not wait for a server."""

    def close(self, failed: bool) -> None:
        """Send what is left. `failed`: the attempt broke off."""


def require_package(name: str) -> None:
    """Check that the tracker's package, which has the tracker's name, is installed.

    Raises:
        ConfigError: it isn't.
    """
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"the run is to be logged to {name}, but the package `{name}` is not installed",
            f"pip install 'tunesmith[{name}]', on a cluster where the workers run; or leave {name} out of --report_to",
        )


def id_of_run(run: RunDir) -> str:
    """Return the id under which every attempt of a run is one run of a tool's, wherever its home lies."""
    digest = hashlib.sha256(f"{run.model_name}/{run.run_name}".encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', run.run_name)[:50]}-{digest}"


def warn_of_failure(name: str, error: Exception) -> None:
    """Log that a tracker is off."""
    logger.warning(
        "%s is off for the rest of this attempt: %s: %s", name, type(error).__name__, describe_error(error)
    )


def describe_error(error: Exception) -> str:
    """Return an error's text on one line, without the password or the token of an address in it."""
    text = " ".join(str(error).split())
    return re.sub(r"(?<=://)[^/\s@]+(?=@)|(?<=token=)[^&\s'\"]+", "…", text)
