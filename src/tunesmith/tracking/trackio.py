"""Trackio, set up by its own variables: `TRACKIO_SPACE_ID`, `TRACKIO_SERVER_URL` or, for local files, `TRACKIO_DIR`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.base import PROJECT, describe_error, id_of_run, require_package

_ANSWER_TIMEOUT_S = 10


class Trackio:
    """Attempts find their run by its name, which is therefore the run's id. A repeated step is kept twice.

    Trackio sends in a thread of its own and never raises when a server doesn't answer: it warns.
    """

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None:
        require_package("trackio")
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=id_of_run(run),
                config=config.model_dump(mode="json"),
                resume="allow",
                embed=False,
            )

    @staticmethod
    def check(config: TrainConfig) -> None:
        """Check the package, and what the variables name, if anything: a Space's hub, or a server."""
        require_package("trackio")
        if os.environ.get("TRACKIO_SPACE_ID"):
            _check_hub()
        elif server := os.environ.get("TRACKIO_SERVER_URL"):
            _check_server(server)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()
            trackio.context_vars.current_run.set(None)  # else it is finished once more at the exit


def _check_hub() -> None:
    from huggingface_hub import whoami

    try:
        whoami()
    except Exception as error:  # no token, one that is refused, or no network
        raise ConfigError(
            f"the run is to be logged to the Space of `TRACKIO_SPACE_ID`, but the hub refuses: {describe_error(error)}",
            "run `hf auth login` or set `HF_TOKEN`; without `TRACKIO_SPACE_ID`, Trackio keeps local files",
        ) from None


def _check_server(url: str) -> None:
    import trackio

    if "write_token=" not in url and not os.environ.get("TRACKIO_WRITE_TOKEN"):
        raise ConfigError(
            "the run is to be logged to the server of `TRACKIO_SERVER_URL`, but there is no token to write with",
            "take the address with `write_token=` that the server shows, or set `TRACKIO_WRITE_TOKEN`",
        )
    try:
        trackio.RemoteClient(url, httpx_kwargs={"timeout": _ANSWER_TIMEOUT_S})
    except Exception as error:  # the network's or the server's
        raise ConfigError(
            f"the run is to be logged to the server of `TRACKIO_SERVER_URL`, which doesn't answer: {describe_error(error)}",
            "correct the address or start the server; without `TRACKIO_SERVER_URL`, Trackio keeps local files",
        ) from None
