"""MLflow: what a real tracking server has recorded, and what is refused."""

from __future__ import annotations

import logging
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.jsonl import MetricsLog
from tunesmith.tracking.trackers import check_trackers, open_trackers

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: `make test-trackers` installs it")
pytestmark = [pytest.mark.slow, pytest.mark.trackers]

CONFIG = TrainConfig(report_to="mlflow", hf_model_id="a/tiny")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a tracking server of our own."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder}/runs.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    command = ["-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    address = f"http://127.0.0.1:{port}"
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log) as process,
    ):
        deadline = time.monotonic() + 240
        while not answers(f"{address}/health"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield address
        process.terminate()


def answers(address: str) -> bool:
    try:
        return bool(urlopen(address, timeout=5).status == 200)
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def record(run: RunDir, config: TrainConfig, steps: range, ending: str = "finished") -> None:
    """Log an attempt that goes on from the step before the first."""
    log = MetricsLog(run.metrics_path, 1, open_trackers(run, config, start_step=steps.start - 1))
    for step in steps:
        log.training(step, {"loss": 3.0 / step, "grad_norm": math.nan, "tokens": 512})
    log.evaluation(steps.stop - 1, {"eval_loss": 2.0})
    log.event(steps.stop - 1, ending, "the end")  # type: ignore[arg-type]
    log.close()


def test_attempts_are_one_run_with_its_parameters_and_metrics(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    check_trackers(CONFIG)
    run = RunDir(tmp_path, "results", "tiny", "a-run")
    client = mlflow.MlflowClient()
    record(run, CONFIG, range(1, 4), ending="failed")
    (experiment,) = [it for it in client.search_experiments() if it.name == "tunesmith"]
    (first,) = client.search_runs([experiment.experiment_id])
    assert (first.info.run_name, first.info.status) == ("a-run", "FAILED")
    record(run, CONFIG.model_copy(update={"max_steps": 5}), range(3, 6))
    (resumed,) = client.search_runs([experiment.experiment_id])
    assert (resumed.info.run_id, resumed.info.status) == (first.info.run_id, "FINISHED")
    settings = CONFIG.model_dump(mode="json")
    assert resumed.data.params == {name: str(value) for name, value in settings.items()}
    history = client.get_metric_history(first.info.run_id, "train/loss")
    assert sorted((it.step, it.value) for it in history) == [
        (step, 3.0 / step) for step in (1, 2, 3, 3, 4, 5)
    ]
    assert set(resumed.data.metrics) == {"train/loss", "train/grad_norm", "eval/loss"}
    assert math.isnan(resumed.data.metrics["train/grad_norm"])


def test_its_own_variables_choose_the_experiment_and_the_run(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    client = mlflow.MlflowClient()
    record(RunDir(tmp_path, "results", "tiny", "a-run"), CONFIG, range(1, 2))
    experiment_id = client.get_experiment_by_name("mine").experiment_id
    (named,) = client.search_runs([experiment_id])
    monkeypatch.setenv("MLFLOW_RUN_ID", named.info.run_id)
    record(RunDir(tmp_path, "results", "tiny", "another"), CONFIG, range(2, 3))
    assert [run.info.run_id for run in client.search_runs([experiment_id])] == [named.info.run_id]
    assert len(client.get_metric_history(named.info.run_id, "train/loss")) == 2


def test_a_server_that_goes_away_turns_it_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "tunesmith"):
        record(RunDir(tmp_path, "results", "tiny", "a-run"), CONFIG, range(1, 4))
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("tunesmith")]
    assert said.startswith("mlflow is off for the rest of this attempt: ")


@pytest.mark.parametrize(
    ("uri", "said", "hint"),
    [
        ("", "is not set", "http://host:5000"),
        ("sqlite:///runs.db", "the relative path `sqlite:///runs.db`", "sqlite:////folder"),
        ("mlruns", "the relative path `mlruns`", "http://host:5000"),
        ("http://me:secret@127.0.0.1:9", "its server can't be used", "MLFLOW_TRACKING_TOKEN"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_at_once(
    uri: str, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=said) as refused:
        check_trackers(CONFIG)
    assert hint in str(refused.value.hint)
    assert "secret" not in str(refused.value)
    assert time.monotonic() - started < 60
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
