"""A tracker of one file: what it is given in a training, with nothing else changed but its line among the trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from support.runs import small_config, start, train_here
from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import iterate_metrics
from tunesmith.tracking.trackers import TRACKERS, check_trackers

pytestmark = pytest.mark.usefixtures("alone")


class Diary:
    """Writes what it is given into a file of the run's home, a line each."""

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None:
        self._path = run.home / "diary.txt"
        self._write(f"from {start_step} of {config.max_steps}")

    @staticmethod
    def check(config: TrainConfig) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._write(f"{step} {tag} {value!r}")

    def close(self, failed: bool) -> None:
        self._write("failed" if failed else "ended well")

    def _write(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{line}\n")


def test_a_tracker_of_one_file_gets_every_metric_of_a_training(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "diary", Diary)
    config = small_config(model_of("llama"), rows, tmp_path / "home", max_steps=2, report_to="diary")
    check_trackers(config)
    run = train_here(start(config))
    tags = {"eval_loss": "eval/loss"} | {
        name: f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    }
    recorded = [
        f"{line['step']} {tags[name]} {value!r}"
        for line in iterate_metrics(run.metrics_path)
        for name, value in line.items()
        if name in tags
    ]
    assert len(recorded) == 2 * 4 + 2
    assert (run.home / "diary.txt").read_text().splitlines() == ["from 0 of 2", *recorded, "ended well"]
    assert not run.tensorboard_path.exists()
