"""What a run records: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError, RunError
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import read_metrics
from tunesmith.tracking.log import MetricsLog, check_wandb, open_trackers, wandb_run_id

TRAINING = {"loss": 2.5, "learning_rate": 1e-4, "grad_norm": 0.7, "tokens": 512, "tokens_per_second": 900.0}


def run_dir_in(home: Path) -> RunDir:
    return RunDir(home, "results", "tiny", "a-run")


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run_python(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_CONFIG_DIR": str(home)}
    command = [sys.executable, "-c", code, str(home)]
    return subprocess.run(
        command, env={**kept, **own, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_new_file_begins_with_its_format_and_keeps_every_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl", attempt=1, dashboards={})
    log.event(0, "start", "fresh start")
    log.evaluation(0, 3.0)
    log.training(1, TRAINING)
    log.close()
    header, *lines = [json.loads(text) for text in (tmp_path / "new" / "metrics.jsonl").open()]
    assert header == {"format_version": 1}
    assert [line["step"] for line in lines] == [0, 0, 1]
    assert {line["attempt"] for line in lines} == {1}
    assert lines[0]["event"] == "start"
    assert lines[0]["message"] == "fresh start"
    assert lines[1]["eval_loss"] == 3.0
    assert {name: lines[2][name] for name in TRAINING} == TRAINING
    assert all(abs(line["time"] - os.stat(tmp_path / "new").st_mtime) < 60 for line in lines)


def test_every_line_is_on_disk_before_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, attempt=1, dashboards={})
    for step in range(1, 6):
        log.training(step, TRAINING)
        assert read_metrics(path)[-1]["step"] == step
    log.close()


@pytest.mark.parametrize("torn_by", range(1, 40, 4))
def test_an_attempt_after_a_torn_line_glues_nothing(tmp_path: Path, torn_by: int) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, attempt=1, dashboards={})
    first.training(1, TRAINING)
    first.training(2, TRAINING)
    first.close()
    os.truncate(path, path.stat().st_size - torn_by)
    second = MetricsLog(path, attempt=2, dashboards={})
    second.training(2, {**TRAINING, "loss": 2.0})
    second.training(3, TRAINING)
    second.close()
    assert [(line["step"], line["attempt"]) for line in read_metrics(path)] == [(1, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1}'])
def test_a_torn_header_is_written_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    log = MetricsLog(path, attempt=1, dashboards={})
    log.training(1, TRAINING)
    log.close()
    assert [next(iter(json.loads(text))) for text in path.open()] == ["format_version", "step"]


def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"format_version": 2}\n')
    with pytest.raises(RunError, match="format version 2"):
        MetricsLog(path, attempt=1, dashboards={})
    assert path.read_text() == '{"format_version": 2}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_numbers_json_lacks_are_strings_that_float_reads(tmp_path: Path, value: float) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, attempt=1, dashboards={})
    log.training(1, {"loss": value, "grad_norm": np.float32(0.5)})
    log.close()
    line = [json.loads(text, parse_constant=refuse) for text in path.open()][-1]
    assert isinstance(line["loss"], str)
    np.testing.assert_equal(float(line["loss"]), float(value))
    assert line["grad_norm"] == 0.5


def test_lines_a_full_disk_refused_are_written_once_it_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, attempt=1, dashboards={})
    log.training(1, TRAINING)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, hard))
        try:
            log.training(2, TRAINING)
            log.training(3, TRAINING)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in read_metrics(path)] == [1]
    assert sum("can't be written" in record.message for record in caplog.records) == 1
    log.training(4, TRAINING)
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_threads_may_record_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, attempt=1, dashboards={})

    def record(first: int) -> None:
        for step in range(first, 1000, 4):
            log.training(step, TRAINING)

    threads = [threading.Thread(target=record, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert [line["step"] for line in read_metrics(path)] == list(range(1000))
    assert len(path.read_text().splitlines()) == 1001


def test_tensorboard_shows_what_the_file_holds(tmp_path: Path) -> None:
    run_dir = run_dir_in(tmp_path)
    log = open_trackers(run_dir, TrainConfig(), attempt=1, start_step=0)
    log.evaluation(0, 3.25)
    for step in range(1, 4):
        log.training(step, {**TRAINING, "loss": 3.0 / step})
    log.close()
    log.close()
    scalars = scalars_of(run_dir.tensorboard_path)
    assert scalars["eval/loss"] == [(0, 3.25)]
    assert scalars["train/loss"] == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert scalars["train/learning_rate"] == [(step, pytest.approx(1e-4)) for step in (1, 2, 3)]
    assert scalars["train/tokens_per_second"] == [(step, 900.0) for step in (1, 2, 3)]
    assert scalars["train/grad_norm"] == [(step, pytest.approx(0.7)) for step in (1, 2, 3)]
    assert len(read_metrics(run_dir.metrics_path)) == 4


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (2, [1, 2])])
def test_a_resumed_attempt_hides_the_later_steps_in_tensorboard(
    tmp_path: Path, start_step: int, kept: list[int]
) -> None:
    run_dir = run_dir_in(tmp_path)
    first = open_trackers(run_dir, TrainConfig(), attempt=1, start_step=0)
    for step in range(1, 6):
        first.training(step, {"loss": 1.0})
    first.close()
    second = open_trackers(run_dir, TrainConfig(), attempt=2, start_step=start_step)
    second.training(start_step + 1, {"loss": 2.0})
    second.close()
    expected = [(step, 1.0) for step in kept] + [(start_step + 1, 2.0)]
    assert scalars_of(run_dir.tensorboard_path)["train/loss"] == expected


def test_a_dashboard_that_fails_is_reported_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = run_dir_in(tmp_path)
    run_dir.tensorboard_path.parent.mkdir(parents=True)
    run_dir.tensorboard_path.write_text("a file where the folder belongs")
    with caplog.at_level(logging.WARNING):
        log = open_trackers(run_dir, TrainConfig(), attempt=1, start_step=0)
        log.training(1, TRAINING)
        log.training(2, TRAINING)
        log.close()
    assert sum("TensorBoard is off" in record.message for record in caplog.records) == 1
    assert [line["step"] for line in read_metrics(run_dir.metrics_path)] == [1, 2]


def test_wandb_is_only_asked_for_when_the_run_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(TrainConfig())
    open_trackers(run_dir_in(tmp_path), TrainConfig(), attempt=1, start_step=0).close()
    with pytest.raises(ConfigError) as raised:
        check_wandb(TrainConfig(use_wandb=True))
    assert "tunesmith[wandb]" in str(raised.value.hint)
    with pytest.raises(ConfigError):
        open_trackers(run_dir_in(tmp_path), TrainConfig(use_wandb=True), attempt=1, start_step=0)


def test_the_wandb_id_is_the_runs_own_and_valid(tmp_path: Path) -> None:
    long = RunDir(tmp_path, "results", "tiny", "a: very/long#name? " * 10)
    assert wandb_run_id(long) == wandb_run_id(RunDir(tmp_path / "moved", "results", "tiny", long.run_name))
    assert len(wandb_run_id(long)) <= 64
    assert not set(":;,#?/' ") & set(wandb_run_id(long))
    others = [RunDir(tmp_path, "results", "other", long.run_name), run_dir_in(tmp_path)]
    assert len({wandb_run_id(run) for run in (long, *others)}) == 3


RECORD_WITH_WANDB = """
import logging, sys
from pathlib import Path
from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir
from tunesmith.tracking.log import check_wandb, open_trackers
logging.basicConfig(level=logging.INFO, format="%(message)s")
config = TrainConfig(use_wandb=True, hf_model_id="a/tiny")
run_dir = RunDir(Path(sys.argv[1]) / "home", "results", "tiny", "a-run")
run_dir.home.mkdir(exist_ok=True)
for attempt in (1, 2):
    log = open_trackers(run_dir, config, attempt, start_step=0)
    log.training(1, {"loss": 2.5, "learning_rate": 1e-4})
    log.evaluation(1, float("nan"))
    log.close()
"""


def test_wandb_records_offline_under_the_home_and_resumes_one_id(tmp_path: Path) -> None:
    code = RECORD_WITH_WANDB.replace("for attempt", "check_wandb(config)\nfor attempt")
    done = run_python(code, tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    home = tmp_path / "home"
    name = f"run-{wandb_run_id(run_dir_in(home))}.wandb"
    records = [path for path in home.glob(f"wandb/offline-run-*/{name}") if not path.is_symlink()]
    assert records, list(home.rglob("*"))
    content = b"".join(path.read_bytes() for path in records)
    for word in (b"train/loss", b"train/learning_rate", b"eval/loss", b"a/tiny"):
        assert word in content
    assert "is off" not in done.stderr
    assert len(read_metrics(run_dir_in(home).metrics_path)) == 2


def test_a_wandb_error_is_said_once_per_attempt_and_the_training_goes_on(tmp_path: Path) -> None:
    done = run_python(RECORD_WITH_WANDB, tmp_path, WANDB_MODE="nonsense")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Weights & Biases is off") == 2
    assert [line["attempt"] for line in read_metrics(run_dir_in(tmp_path / "home").metrics_path)] == [2, 2]


@pytest.mark.parametrize(("mode", "word"), [("online", "WANDB_API_KEY"), ("nonsense", "WANDB_…")])
def test_wandb_that_cannot_work_is_refused_early(tmp_path: Path, mode: str, word: str) -> None:
    code = (
        "from tunesmith.config import TrainConfig\nfrom tunesmith.errors import ConfigError\n"
        "from tunesmith.tracking.log import check_wandb\n"
        "try:\n    check_wandb(TrainConfig(use_wandb=True))\nexcept ConfigError as error:\n    print(error)\n"
    )
    done = run_python(code, tmp_path, WANDB_MODE=mode)
    assert done.returncode == 0, done.stderr
    assert "hint:" in done.stdout
    assert word in done.stdout
