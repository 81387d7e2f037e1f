"""metrics.jsonl: what a run records, and what of it goes to the trackers."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

from tunesmith.errors import RunError
from tunesmith.runs.metrics_log import read_metrics
from tunesmith.tracking.jsonl import MetricsLog

TRAINING = {"loss": 2.5, "learning_rate": 1e-4, "grad_norm": 0.7, "tokens": 512, "tokens_per_second": 900.0}


def test_a_new_file_begins_with_its_format_and_keeps_every_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl", attempt=1, trackers={})
    log.event(0, "start", "fresh start")
    log.evaluation(0, {"eval_loss": 3.0})
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
    log = MetricsLog(path, attempt=1, trackers={})
    for step in range(1, 6):
        log.training(step, TRAINING)
        assert read_metrics(path)[-1]["step"] == step
    log.close()


@pytest.mark.parametrize("torn_by", range(1, 40, 4))
def test_an_attempt_after_a_torn_line_glues_nothing(tmp_path: Path, torn_by: int) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, attempt=1, trackers={})
    first.training(1, TRAINING)
    first.training(2, TRAINING)
    first.close()
    os.truncate(path, path.stat().st_size - torn_by)
    second = MetricsLog(path, attempt=2, trackers={})
    second.training(2, {**TRAINING, "loss": 2.0})
    second.training(3, TRAINING)
    second.close()
    assert [(line["step"], line["attempt"]) for line in read_metrics(path)] == [(1, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1}'])
def test_a_torn_header_is_written_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    log = MetricsLog(path, attempt=1, trackers={})
    log.training(1, TRAINING)
    log.close()
    assert [next(iter(json.loads(text))) for text in path.open()] == ["format_version", "step"]


def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"format_version": 2}\n')
    with pytest.raises(RunError, match="format version 2"):
        MetricsLog(path, attempt=1, trackers={})
    assert path.read_text() == '{"format_version": 2}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_numbers_json_lacks_are_strings_that_float_reads(tmp_path: Path, value: float) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, attempt=1, trackers={})
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
    log = MetricsLog(path, attempt=1, trackers={})
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
    log = MetricsLog(path, attempt=1, trackers={})

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
