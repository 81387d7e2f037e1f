"""The run folder: names, and which checkpoint is chosen."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tunesmith.atomic_files import write_json
from tunesmith.errors import RunError
from tunesmith.runs.folder import STATE_FILE, RunDir, open_run
from tunesmith.runs.metrics_log import read_metrics


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "home", "results", "Qwen3-14B", "first")
    run.path.mkdir(parents=True)
    return run


def add_checkpoint(run: RunDir, step: int, eval_loss: float | None) -> Path:
    folder = run.checkpoint_path(step)
    folder.mkdir()
    write_json(folder / STATE_FILE, {"format_version": 1, "step": step, "eval_loss": eval_loss})
    return folder


def test_folders_are_those_of_the_documentation(run: RunDir) -> None:
    home = run.home
    assert run.path == home / "results/Qwen3-14B/ray_results/TorchTrainer_first"
    assert run.final_path == home / "results/Qwen3-14B/final"
    assert run.tensorboard_path == home / "tensorboard_logs/Qwen3-14B/first"
    assert run.log_path() == home / "logs/fine_tune.log"


def test_best_is_chosen_by_the_recorded_loss_and_latest_by_the_step(run: RunDir) -> None:
    for step, loss in ((300, 0.9), (20, 0.5), (100, None), (40, math.nan)):
        add_checkpoint(run, step, loss)
    os.utime(run.checkpoint_path(100))  # the newest file
    latest, best = run.latest_checkpoint(), run.best_checkpoint()
    assert latest is not None
    assert best is not None
    assert (latest.step, best.step) == (300, 20)


def test_without_a_measured_loss_the_best_is_the_latest(run: RunDir) -> None:
    assert run.best_checkpoint() is None
    add_checkpoint(run, 1, None)
    add_checkpoint(run, 2, None)
    best = run.best_checkpoint()
    assert best is not None
    assert best.step == 2


def test_an_unfinished_checkpoint_is_never_chosen_and_is_cleaned_up(run: RunDir) -> None:
    add_checkpoint(run, 10, 1.0)
    unfinished = run.unfinished_path(20, "abc")
    unfinished.mkdir()
    write_json(unfinished / STATE_FILE, {"format_version": 1, "step": 20, "eval_loss": 0.1})
    run.checkpoint_path(30).mkdir()  # without a state it is none of ours
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [10]
    run.clean()
    assert not unfinished.exists()
    assert run.checkpoint_path(10).exists()


def test_the_best_is_kept_besides_the_newest(run: RunDir) -> None:
    for step, loss in ((10, 0.5), (20, 0.4), (30, 0.6), (40, None), (50, 0.7)):
        add_checkpoint(run, step, loss)
    run.discard_checkpoints(keep_newest=2)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [20, 40, 50]
    assert not list(run.path.glob(".*"))


@pytest.mark.parametrize("where", ["", "home", "checkpoint", "name"])
def test_a_run_is_found_from_its_folder_home_checkpoint_or_name(run: RunDir, where: str) -> None:
    folder = add_checkpoint(run, 10, None)
    path = {"": run.path, "home": run.home, "checkpoint": folder, "name": Path("first")}[where]
    found = open_run(path, home=run.home if where == "name" else None)
    assert found == run


def test_a_home_of_two_runs_is_refused_with_their_paths(run: RunDir) -> None:
    second = RunDir(run.home, "results", "Qwen3-14B", "second")
    second.path.mkdir(parents=True)
    with pytest.raises(RunError, match="holds 2 runs") as error:
        open_run(run.home)
    assert str(second.path) in str(error.value)
    with pytest.raises(RunError, match="no run at"):
        open_run(run.home / "nowhere")


def test_a_resumed_run_keeps_each_steps_last_line(run: RunDir) -> None:
    lines = [
        {"format_version": 1},
        {"step": 1, "attempt": 1, "loss": 3.0},
        {"step": 2, "attempt": 1, "loss": 2.0},
        {"step": 2, "attempt": 1, "eval_loss": 2.5},
        {"step": 2, "attempt": 2, "loss": 1.9},
        {"step": 3, "attempt": 2, "loss": 1.0},
    ]
    run.metrics_path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "att')
    assert [(line["step"], line.get("loss")) for line in read_metrics(run.metrics_path)] == [
        (1, 3.0),
        (2, 1.9),
        (2, None),
        (3, 1.0),
    ]


def test_a_newer_format_is_refused(run: RunDir) -> None:
    run.metrics_path.write_text('{"format_version": 99}\n')
    with pytest.raises(RunError, match="format version 99"):
        read_metrics(run.metrics_path)
    run.params_path.write_text('{"format_version": 99}')
    with pytest.raises(RunError, match="format version 99"):
        run.read_params()
    folder = add_checkpoint(run, 10, None)
    write_json(folder / STATE_FILE, {"format_version": 99, "step": 10, "eval_loss": None})
    with pytest.raises(RunError, match="format version 99"):
        run.checkpoints()


def test_a_failed_write_leaves_the_old_file(run: RunDir) -> None:
    run.write_params({"a": 1})
    circular: dict[str, object] = {}
    circular["self"] = circular
    with pytest.raises(ValueError, match="Circular"):
        run.write_params(circular)
    assert run.read_params()["a"] == 1
    assert [path.name for path in run.path.iterdir()] == ["params.json"]
