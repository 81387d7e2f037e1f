"""MLflow, set up by its own variables: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_RUN_ID` …"""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.base import PROJECT, describe_error, id_of_run, require_package

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

_RUN_TAG = "tunesmith.run"
_RELATIVE = re.compile(r"sqlite:///[^/]|(?!databricks)[^/:]+(/|$)")
_CLOSE_TIMEOUT_S = 60
# MLflow would try a server that doesn't answer eight times, for minutes.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MLflow:
    """Attempts find their run by a tag, because the server chooses its id.

    The tool keeps every value of a repeated step, and a parameter's first one. The server is spoken to in a thread:
    what goes wrong there is raised by the next call.
    """

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None:
        require_package("mlflow")
        self._sender = _Sender()
        self._sender.put(partial(self._open, run, config))

    @staticmethod
    def check(config: TrainConfig) -> None:
        """Check the package and the address, and that a server answers there."""
        require_package("mlflow")
        from mlflow import MlflowClient

        _check_address(os.environ.get("MLFLOW_TRACKING_URI", ""))
        try:
            with _variables_set(_IMPATIENT):
                MlflowClient().search_experiments(max_results=1)
        except Exception as error:  # the network's, the server's, or a database driver's
            raise ConfigError(
                f"the run is to be logged to mlflow, but its server can't be used: {describe_error(error)}",
                "set `MLFLOW_TRACKING_URI` to a server that runs; `MLFLOW_TRACKING_TOKEN`, or "
                "`MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, log in to it",
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._sender.put(partial(self._log, step, dict(values), int(time.time() * 1000)))

    def close(self, failed: bool) -> None:
        self._sender.put(
            lambda: self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")
        )
        self._sender.close(_CLOSE_TIMEOUT_S)

    def _open(self, run: RunDir, config: TrainConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        self._client = MlflowClient()
        recorded = _open_run(self._client, run)
        self._run_id = recorded.info.run_id
        settings = config.model_dump(mode="json")
        params = [
            Param(name, str(value)) for name, value in settings.items() if name not in recorded.data.params
        ]
        self._client.log_batch(self._run_id, params=params)
        logger.info("MLflow: run %s of experiment %s", self._run_id, recorded.info.experiment_id)

    def _log(self, step: int, values: Mapping[str, float], timestamp_ms: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(tag, float(value), timestamp_ms, step) for tag, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)


class _Sender:
    """Makes calls in order, in a thread of its own; the first that fails is the last."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[], object]) -> None:
        if self._error is not None:
            raise self._error
        self._calls.put(call)

    def close(self, timeout_s: float) -> None:
        self._calls.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the server hasn't taken everything within {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                call()
            except Exception as error:  # raised in the caller's thread
                self._error = error
                return


def _open_run(client: MlflowClient, run: RunDir) -> Run:
    """Return the server's run: that of `MLFLOW_RUN_ID`, or of an earlier attempt, or a new one."""
    from mlflow.tracking.context.registry import resolve_tags

    given = os.environ.get("MLFLOW_RUN_ID")
    if given:
        found = [client.get_run(given)]
    else:
        experiment_id = _open_experiment(client)
        found = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{id_of_run(run)}'", max_results=1)
    if not found:
        tags = resolve_tags({_RUN_TAG: id_of_run(run)})
        return client.create_run(experiment_id, tags=tags, run_name=run.run_name)
    client.update_run(found[0].info.run_id, status="RUNNING")
    return found[0]


def _open_experiment(client: MlflowClient) -> str:
    """Return the id of the experiment that MLflow's variables name, by default `tunesmith`."""
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if given:
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


def _check_address(uri: str) -> None:
    """Refuse an address that is missing, or that would lead the workers, who run in another folder, elsewhere."""
    if uri and not _RELATIVE.match(uri):
        return
    raise ConfigError(
        "the run is to be logged to mlflow, but `MLFLOW_TRACKING_URI` is "
        + (f"the relative path `{uri}`" if uri else "not set"),
        "set it to a server's address, as http://host:5000, or to a database's, as sqlite:////folder/mlflow.db, "
        "which takes the whole package `mlflow`",
    )


@contextmanager
def _variables_set(values: Mapping[str, str]) -> Iterator[None]:
    """Set the environment variables that aren't set, for a while."""
    own = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
