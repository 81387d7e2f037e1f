"""Which trackers a run has, what they are given, and what happens when one can't work."""

from __future__ import annotations

import logging
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from tunesmith.config import TrainConfig
from tunesmith.errors import ConfigError
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import default_run_name
from tunesmith.runs.metrics_log import read_metrics
from tunesmith.tracking.base import describe_error, id_of_run
from tunesmith.tracking.jsonl import MetricsLog
from tunesmith.tracking.trackers import TRACKERS, check_trackers, open_trackers

EXTRAS = [name for name in TRACKERS if name != "tensorboard"]


def run_dir_in(home: Path) -> RunDir:
    return RunDir(home, "results", "tiny", "a-run")


class Recorder:
    """Keeps what it is given."""

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None:
        self.start_step = start_step
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.failed: bool | None = None

    @staticmethod
    def check(config: TrainConfig) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def close(self, failed: bool) -> None:
        self.failed = failed


class Broken(Recorder):
    """Loses its server after the first step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        super().log(step, values)
        if step > 1:
            raise ConnectionError("no answer from\nhttps://me:secret@host/log?write_token=abc&step=2")


def test_a_run_is_logged_where_report_to_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "recorder", Recorder)
    for number, (report_to, names) in enumerate(
        [
            (None, ["tensorboard"]),
            ("none", []),
            (["none"], []),
            ([], []),
            ("recorder", ["recorder"]),
            ("recorder, tensorboard,recorder", ["recorder", "tensorboard"]),
        ]
    ):
        config = TrainConfig() if report_to is None else TrainConfig(report_to=report_to)
        check_trackers(config)
        run = run_dir_in(tmp_path / str(number))
        log = MetricsLog(run.metrics_path, 1, trackers := open_trackers(run, config, start_step=0))
        log.training(1, {"loss": 2.5})
        log.close()
        assert list(trackers) == names
        assert run.tensorboard_path.exists() == ("tensorboard" in names)
        assert [line["loss"] for line in read_metrics(run.metrics_path)] == [2.5]


def test_use_wandb_adds_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(TRACKERS, "tensorboard", Recorder)
    check_trackers(TrainConfig())
    for config in (TrainConfig(use_wandb=True), TrainConfig(use_wandb=True, report_to="none")):
        with pytest.raises(ConfigError, match="wandb"):
            check_trackers(config)


def test_every_tracker_is_a_dependency_or_an_extra_of_its_name() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    dependencies = {line.partition(">=")[0] for line in project["dependencies"]}
    assert TRACKERS.keys() <= dependencies | project["optional-dependencies"].keys()


def test_where_a_run_is_logged_does_not_name_it() -> None:
    assert default_run_name(TrainConfig(report_to="none")) == default_run_name(TrainConfig())


@pytest.mark.parametrize(("name", "hint"), [("wandbb", "did you mean `wandb`?"), ("all", "--report_to none")])
def test_an_unknown_tracker_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}`.*{', '.join(TRACKERS)}") as refused:
        check_trackers(TrainConfig(report_to=name))
    assert hint in str(refused.value.hint)


@pytest.mark.parametrize("name", EXTRAS)
def test_a_tracker_without_its_package_is_refused_on_every_node(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = TrainConfig(report_to=name)
    with pytest.raises(ConfigError, match=f"`{name}` is not installed") as refused:
        check_trackers(config)
    assert f"tunesmith[{name}]" in str(refused.value.hint)
    with pytest.raises(ConfigError, match=f"`{name}` is not installed"):
        open_trackers(run_dir_in(tmp_path), config, start_step=0)


def test_trackers_get_every_metric_but_the_files_own_by_its_tag(tmp_path: Path) -> None:
    run = run_dir_in(tmp_path)
    recorder = Recorder(run, TrainConfig(), start_step=0)
    log = MetricsLog(run.metrics_path, 1, {"recorder": recorder})
    log.evaluation(0, {"eval_loss": 3.0, "eval_margin": 0.25})
    log.training(1, {"loss": 2.5, "mfu": 0.4, "margin": 0.5, "epoch": 0.1, "tokens": 512, "data_wait_s": 0.0})
    log.event(1, "finished", "step 1 of 1")
    log.close()
    assert recorder.logged == [
        (0, {"eval/loss": 3.0, "eval/margin": 0.25}),
        (1, {"train/loss": 2.5, "train/mfu": 0.4, "train/margin": 0.5}),
    ]
    assert read_metrics(run.metrics_path)[0]["eval_margin"] == 0.25
    assert recorder.failed is False


@pytest.mark.parametrize("ending", ["failed", None])
def test_a_tracker_learns_that_the_attempt_broke_off(tmp_path: Path, ending: str | None) -> None:
    recorder = Recorder(run_dir_in(tmp_path), TrainConfig(), start_step=0)
    log = MetricsLog(tmp_path / "metrics.jsonl", 1, {"recorder": recorder})
    log.event(0, "start", "fresh start")
    if ending == "failed":
        log.event(1, "failed", "loss is not finite")
    log.close()
    assert recorder.failed is True


def test_a_tracker_that_fails_is_reported_once_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_dir_in(tmp_path)
    broken, sound = Broken(run, TrainConfig(), 0), Recorder(run, TrainConfig(), 0)
    log = MetricsLog(run.metrics_path, 1, {"broken": broken, "sound": sound})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            log.training(step, {"loss": 2.0})
        log.close()
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "broken is off for the rest of this attempt: ConnectionError: no answer from https"
    )
    assert "secret" not in said and "abc" not in said
    assert [step for step, _ in broken.logged] == [1, 2]
    assert [step for step, _ in sound.logged] == [1, 2, 3]
    assert broken.failed is None and sound.failed is True


def test_an_error_shows_no_password_of_an_address() -> None:
    error = RuntimeError("to http://a:b@host/x?token=c&n=1 and\nhttps://host/d@e")
    assert describe_error(error) == "to http://…@host/x?token=…&n=1 and https://host/d@e"


def test_the_id_of_a_run_is_its_own_and_fits_every_tool(tmp_path: Path) -> None:
    long = RunDir(tmp_path, "results", "tiny", "a: very/long#name? " * 10)
    assert id_of_run(long) == id_of_run(RunDir(tmp_path / "moved", "results", "tiny", long.run_name))
    assert len(id_of_run(long)) <= 64
    assert not set(":;,#?/' ") & set(id_of_run(long))
    others = [RunDir(tmp_path, "results", "other", long.run_name), run_dir_in(tmp_path)]
    assert len({id_of_run(run) for run in (long, *others)}) == 3
