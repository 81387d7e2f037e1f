"""A training as a job of a running Ray cluster, submitted from outside it: the only import of ray.job_submission."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tunesmith
from tunesmith.cluster.resources import check_address, no_answer
from tunesmith.config import TrainConfig
from tunesmith.config.layers import dump_yaml
from tunesmith.errors import ConfigError, SubmitError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

logger = logging.getLogger(__name__)

_CONFIG = "run.yaml"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Ray kills a stopped job after 3 s by default; a step and its checkpoint take longer.
_STOP_WAIT_S = 600
_POLL_S = 1.0


@dataclass(frozen=True)
class RayJob:
    """A job that a Ray cluster has taken."""

    submission_id: str
    client: JobSubmissionClient

    def describe(self) -> str:
        """Return where it is, and how to follow it, in words."""
        return f"""The training {self.submission_id} is submitted to {self.client.get_address()}.

Follow its log:
  ray job logs --follow {self.submission_id}

Read its status:
  ray job status {self.submission_id}

End it, with a checkpoint:
  ray job stop {self.submission_id}

Submitting it again goes on from the last checkpoint; changed settings start a new run."""

    def wait(self) -> int:
        """Print the job's output while it runs, and return its exit code: 1 if it was stopped or had none.

        Raises:
            SubmitError: the cluster doesn't answer any more.
        """
        import aiohttp

        try:
            asyncio.run(self._print_logs())
            while not (details := self.client.get_job_info(self.submission_id)).status.is_terminal():
                time.sleep(_POLL_S)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            raise SubmitError(
                f"the job `{self.submission_id}` can't be followed any more: {error}",
                f"it may still run: `ray job status {self.submission_id}`",
            ) from error
        logger.info("the job has %s", details.status.lower())
        return 0 if details.status == "SUCCEEDED" else details.driver_exit_code or 1

    async def _print_logs(self) -> None:
        async for text in self.client.tail_job_logs(self.submission_id):
            print(text, end="", flush=True)


def address_variable() -> str | None:
    """Return the variable that holds a cluster's address, as Ray's own commands look for it."""
    return next((name for name in _ADDRESS_VARIABLES if os.environ.get(name)), None)


def submit_ray_job(config: TrainConfig, name: str) -> RayJob:
    """Submit `tunesmith train` with this config to the cluster of `address_variable`, and return without waiting.

    The code that runs is this package's; what it needs comes with the nodes' image. `name` begins the job's id.

    Raises:
        ConfigError: the config has no home that outlives the job, or Ray can't submit jobs from here.
        ResourceError: no Ray cluster answers at the address.
        SubmitError: the cluster refuses the job.
    """
    _check_home(config)
    client = _connect()
    with TemporaryDirectory() as folder:
        Path(folder, _CONFIG).write_text(dump_yaml(config), encoding="utf-8")
        try:
            submission_id = client.submit_job(
                entrypoint=f"python -m tunesmith train {_CONFIG}",
                runtime_env=_runtime_env(folder),
                submission_id=f"{name}-{uuid.uuid4().hex[:6]}",
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SubmitError(f"the Ray cluster refuses the job: {error}") from error
    return RayJob(submission_id, client)


def _check_home(config: TrainConfig) -> None:
    if config.home is None:
        raise ConfigError(
            "the run has no `home`, and Ray deletes the folder that a job starts in",
            "give a folder on a disk that all nodes mount: --home /mnt/shared/my_run",
        )


def _connect() -> JobSubmissionClient:
    variable = address_variable()
    assert variable is not None, "a Ray job needs the address of a cluster"
    address = os.environ[variable]
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError(
            "Ray can't submit jobs from here", "install its client: pip install 'tunesmith[cluster]'"
        )
    check_address(address, variable)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # else it tells of every upload
    try:
        # It looks for the address where `address_variable` does.
        return JobSubmissionClient()
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise no_answer(address, error, variable) from error


def _runtime_env(folder: str) -> dict[str, Any]:
    return {
        "working_dir": folder,
        "py_modules": [str(Path(tunesmith.__file__).parent)],
        "excludes": ["__pycache__", "raytrain"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
    }
