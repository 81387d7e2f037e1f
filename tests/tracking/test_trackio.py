"""Trackio: what its real files and its real server hold, and what is refused."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.base import id_of_run
from tunesmith.tracking.trackers import check_trackers

pytest.importorskip("trackio", reason="Trackio is not installed: `make test-trackers` installs it")
pytestmark = [pytest.mark.slow, pytest.mark.trackers]

CONFIG = TrainConfig(report_to="trackio")
RECORD = """
import sys
from pathlib import Path
from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.jsonl import MetricsLog
from tunesmith.tracking.trackers import check_trackers, open_trackers
config = TrainConfig(report_to="trackio", hf_model_id="a/tiny")
check_trackers(config)
run = RunDir(Path(sys.argv[1]), "results", "tiny", "a-run")
for attempt, steps in ((1, (1, 2, 3)), (2, (3, 4))):
    log = MetricsLog(run.metrics_path, attempt, open_trackers(run, config, steps[0] - 1))
    for step in steps:
        log.training(step, {"loss": 3.0 / step, "grad_norm": float("nan"), "tokens": 512})
    log.evaluation(steps[-1], {"eval_loss": 2.0})
    log.close()
"""
SERVE = """
import trackio
print(trackio.show(open_browser=False, block_thread=False, share=False)[-1], flush=True)
input()
"""


def environment(folder: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    return {**kept, "TRACKIO_DIR": str(folder), **changes}


def record(home: Path, folder: Path, **changes: str) -> None:
    """Log two attempts, in a process of its own, because Trackio reads its variables when it is imported."""
    command = [sys.executable, "-c", RECORD, str(home)]
    done = subprocess.run(
        command, env=environment(folder, **changes), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "is off" not in done.stderr


def assert_holds_both_attempts(folder: Path, run: RunDir) -> None:
    with sqlite3.connect(folder / "tunesmith.db") as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        (config,) = database.execute("SELECT config FROM configs").fetchone()
    assert {name for _, name, _, _ in rows} == {id_of_run(run)}
    assert len({run_id for run_id, *_ in rows}) == 1
    logged = [(step, json.loads(metrics)) for *_, step, metrics in rows]
    assert [(step, it["train/loss"]) for step, it in logged if "train/loss" in it] == [
        (step, 3.0 / step) for step in (1, 2, 3, 3, 4)
    ]
    assert [(step, it) for step, it in logged if "eval/loss" in it] == [
        (3, {"eval/loss": 2.0}),
        (4, {"eval/loss": 2.0}),
    ]
    assert "tokens" not in str(logged)
    assert json.loads(config)["hf_model_id"] == "a/tiny"


def test_attempts_are_one_run_in_local_files(tmp_path: Path) -> None:
    record(tmp_path / "home", tmp_path / "trackio")
    assert_holds_both_attempts(tmp_path / "trackio", RunDir(tmp_path / "home", "results", "tiny", "a-run"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of our own, with its token."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        env=environment(tmp_path / "served"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield next(line for line in process.stdout if line.startswith("http")).strip()
        process.kill()


def test_attempts_are_one_run_on_a_server(server: str, tmp_path: Path) -> None:
    record(tmp_path / "home", tmp_path / "trackio", TRACKIO_SERVER_URL=server)
    assert_holds_both_attempts(tmp_path / "served", RunDir(tmp_path / "home", "results", "tiny", "a-run"))


@pytest.mark.parametrize(
    ("variables", "said", "hint"),
    [
        ({"TRACKIO_SPACE_ID": "me/space"}, "the hub refuses", "HF_TOKEN"),
        ({"TRACKIO_SERVER_URL": "http://127.0.0.1:9"}, "no token", "TRACKIO_WRITE_TOKEN"),
        (
            {"TRACKIO_SERVER_URL": "http://127.0.0.1:9/?write_token=secret"},
            "doesn't answer",
            "TRACKIO_SERVER_URL",
        ),
    ],
)
def test_what_cannot_be_reached_is_refused(
    variables: dict[str, str], said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("TRACKIO_", "HF_TOKEN"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said) as refused:
        check_trackers(CONFIG)
    assert hint in str(refused.value.hint)
    assert "secret" not in str(refused.value)
