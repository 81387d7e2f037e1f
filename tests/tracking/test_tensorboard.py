"""TensorBoard: what its event files hold."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import read_metrics
from tunesmith.tracking.jsonl import MetricsLog
from tunesmith.tracking.trackers import open_trackers

TRAINING = {"loss": 2.5, "learning_rate": 1e-4, "grad_norm": 0.7, "tokens": 512, "tokens_per_second": 900.0}


def open_log(run: RunDir, attempt: int = 1, start_step: int = 0) -> MetricsLog:
    return MetricsLog(run.metrics_path, attempt, open_trackers(run, TrainConfig(), start_step))


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, "results", "tiny", "a-run")


def test_tensorboard_shows_what_the_file_holds(run: RunDir) -> None:
    log = open_log(run)
    log.evaluation(0, {"eval_loss": 3.25})
    for step in range(1, 4):
        log.training(step, {**TRAINING, "loss": 3.0 / step})
    log.close()
    log.close()
    assert scalars_of(run.tensorboard_path) == {
        "eval/loss": [(0, 3.25)],
        "train/loss": [(1, 3.0), (2, 1.5), (3, 1.0)],
        "train/learning_rate": [(step, pytest.approx(1e-4)) for step in (1, 2, 3)],
        "train/tokens_per_second": [(step, 900.0) for step in (1, 2, 3)],
        "train/grad_norm": [(step, pytest.approx(0.7)) for step in (1, 2, 3)],
    }
    assert len(read_metrics(run.metrics_path)) == 4


@pytest.mark.parametrize(("start_step", "kept"), [(0, []), (2, [1, 2])])
def test_a_resumed_attempt_hides_the_later_steps(run: RunDir, start_step: int, kept: list[int]) -> None:
    first = open_log(run)
    for step in range(1, 6):
        first.training(step, {"loss": 1.0})
    first.close()
    # Event files are ordered by the second that they begin in, and no attempt begins within one of the last.
    time.sleep(1 - time.time() % 1)
    second = open_log(run, attempt=2, start_step=start_step)
    second.training(start_step + 1, {"loss": 2.0})
    second.close()
    expected = [(step, 1.0) for step in kept] + [(start_step + 1, 2.0)]
    assert scalars_of(run.tensorboard_path)["train/loss"] == expected


def test_a_folder_that_cannot_be_made_turns_it_off(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    run.tensorboard_path.parent.mkdir(parents=True)
    run.tensorboard_path.write_text("a file where the folder belongs")
    with caplog.at_level(logging.WARNING):
        log = open_log(run)
        log.training(1, TRAINING)
        log.close()
    assert sum("tensorboard is off" in record.message for record in caplog.records) == 1
    assert [line["step"] for line in read_metrics(run.metrics_path)] == [1]
