"""What SIGINT and SIGTERM do while a training runs; real signals to this very process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tunesmith import signals
from tunesmith.runs.folder import RunDir
from tunesmith.signals import ended_by_sigterm, stopping_on_signals


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose first attempt has trained and finished."""
    run = RunDir(tmp_path, "results", "model", "run")
    run.path.mkdir(parents=True)
    write(run, attempt=1, step=1, loss=2.0)
    write(run, attempt=1, step=1, event="finished")
    return run


def write(run: RunDir, **line: Any) -> None:
    with run.metrics_path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two of its own instructions


def test_before_anything_is_trained_the_first_signal_ends_all(run: RunDir) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopping_on_signals(run, 1, lambda _: None):
        send(signal.SIGTERM)
    assert not run.stop_path.exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_later_the_first_asks_for_a_checkpoint_and_the_second_ends_all(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    with stopping_on_signals(run, 1, notes.append) as received:
        write(run, attempt=2, step=2, loss=1.0)
        send(signal.SIGTERM)
        assert run.stop_path.exists()
        send(signal.SIGINT)  # at once, as `timeout` signals the process and then its group
        assert (received, len(notes)) == ([signal.SIGTERM], 1)
        monkeypatch.setattr(signals, "_SAME_REQUEST_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]


def test_once_the_attempt_has_ended_there_is_nothing_to_stop(run: RunDir) -> None:
    with stopping_on_signals(run, 1, lambda _: None) as received:
        write(run, attempt=2, step=2, event="finished")
        send(signal.SIGINT)
    assert received == []
    assert not run.stop_path.exists()


def test_sigterm_ends_other_work_with_its_own_exit_code() -> None:
    with pytest.raises(SystemExit) as ended, ended_by_sigterm():
        send(signal.SIGTERM)
    assert ended.value.code == 143
