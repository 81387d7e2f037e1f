"""Weights & Biases: its real offline files, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import read_metrics
from tunesmith.tracking.base import id_of_run

pytestmark = [pytest.mark.slow, pytest.mark.trackers]

CHECK = """
import sys
from pathlib import Path
from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.tracking.trackers import check_trackers, open_trackers
config = TrainConfig(report_to="wandb", hf_model_id="a/tiny")
try:
    check_trackers(config)
except ConfigError as error:
    print(error)
"""
RECORD = """
import logging
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.jsonl import MetricsLog
logging.basicConfig(level=logging.INFO, format="%(message)s")
run = RunDir(Path(sys.argv[1]) / "home", "results", "tiny", "a-run")
run.home.mkdir()
for attempt in (1, 2):
    log = MetricsLog(run.metrics_path, attempt, open_trackers(run, config, start_step=0))
    log.training(1, {"loss": 2.5, "learning_rate": 1e-4})
    log.evaluation(1, {"eval_loss": float("nan")})
    log.close()
"""


def run_python(code: str, home: Path, mode: str) -> subprocess.CompletedProcess[str]:
    """Run the code in a process of its own, because wandb remembers its settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_CONFIG_DIR": str(home), "WANDB_MODE": mode}
    command = [sys.executable, "-c", code, str(home)]
    return subprocess.run(
        command, env={**kept, **own}, capture_output=True, text=True, timeout=120, check=True
    )


def test_offline_files_lie_under_the_home_and_attempts_share_an_id(tmp_path: Path) -> None:
    done = run_python(CHECK + RECORD, tmp_path, mode="offline")
    run = RunDir(tmp_path / "home", "results", "tiny", "a-run")
    records = list(run.home.glob(f"wandb/offline-run-*/run-{id_of_run(run)}.wandb"))
    assert records, list(run.home.rglob("*"))
    content = b"".join(path.read_bytes() for path in records)
    for word in (b"train/loss", b"train/learning_rate", b"eval/loss", b"a/tiny"):
        assert word in content
    assert "is off" not in done.stderr
    assert len(read_metrics(run.metrics_path)) == 2


def test_settings_it_refuses_are_an_error_at_the_check_and_a_warning_in_the_training(tmp_path: Path) -> None:
    done = run_python(CHECK + RECORD, tmp_path, mode="nonsense")
    assert "hint: correct the `WANDB_…` environment variables" in done.stdout
    assert done.stderr.count("wandb is off") == 2
    run = RunDir(tmp_path / "home", "results", "tiny", "a-run")
    assert [line["attempt"] for line in read_metrics(run.metrics_path)] == [2, 2]


def test_a_missing_key_is_refused_with_both_remedies(tmp_path: Path) -> None:
    hint = run_python(CHECK, tmp_path, mode="online").stdout.partition("hint: ")[2]
    assert "WANDB_API_KEY" in hint and "WANDB_MODE=offline" in hint
