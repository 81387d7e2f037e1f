"""A profile of some steps: its files, the steps in them, and that the training is none the wiser."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.runs import copy_run, losses, small_config, start, train_here
from tunesmith.config import TrainConfig
from tunesmith.runs.folder import RunDir
from tunesmith.runs.identity import default_run_name
from tunesmith.tracking.jsonl import MetricsLog
from tunesmith.train.profiling import choose_steps

pytestmark = [pytest.mark.usefixtures("alone")]
ModelOf = Callable[[str], Path]
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def plain(model_of: ModelOf, rows: Path, tmp_path_factory: pytest.TempPathFactory, alone: None) -> RunDir:
    config = small_config(model_of("llama"), rows, tmp_path_factory.mktemp("plain"), max_steps=6, **SETTINGS)
    return train_here(start(config))


@pytest.fixture
def config(model_of: ModelOf, rows: Path, tmp_path: Path) -> TrainConfig:
    return small_config(model_of("llama"), rows, tmp_path / "home", max_steps=6, **SETTINGS)


def profiled(run: RunDir) -> dict[str, int]:
    """Return the traces by name, with the steps that each holds."""
    return {
        path.name: len({event["name"] for event in events_of(path) if is_step(event)})
        for path in run.profile_path.glob("*.trace.json.gz")
    }


def events_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return list(json.load(file)["traceEvents"])


def is_step(event: dict[str, Any]) -> bool:
    return event.get("name", "").startswith("ProfilerStep#") and event["ph"] == "X"


def test_the_steps_asked_for_are_in_the_trace_and_cost_no_digit(plain: RunDir, config: TrainConfig) -> None:
    run = train_here(start(config.model_copy(update={"profile": 2})))
    assert profiled(run) == {"steps_00000003-00000004.trace.json.gz": 2}
    (table,) = run.profile_path.glob("*.txt")
    assert "aten::" in table.read_text() and table.stem == "steps_00000003-00000004"
    for column in ("loss", "grad_norm", "eval_loss"):
        assert losses(run, column) == losses(plain, column)
    assert not plain.profile_path.exists()


def test_a_resumed_attempt_profiles_its_own_first_steps(plain: RunDir, config: TrainConfig) -> None:
    assert config.home is not None
    copy_run(plain, config.home)
    run = train_here(start(config.model_copy(update={"max_steps": 10, "profile": 1})))
    assert profiled(run) == {"steps_00000009-00000009.trace.json.gz": 1}


def test_an_attempt_that_breaks_off_keeps_the_steps_it_has_profiled(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = MetricsLog.training

    def break_off(log: MetricsLog, step: int, values: dict[str, float]) -> None:
        record(log, step, values)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "training", break_off)
    job = start(config.model_copy(update={"profile": 3}))
    with pytest.raises(KeyboardInterrupt):
        train_here(job)
    assert profiled(job.run) == {"steps_00000003-00000004.trace.json.gz": 2}


def test_the_last_steps_are_profiled_where_few_are_left() -> None:
    assert choose_steps(0, 100, 3) == range(3, 6)
    assert choose_steps(40, 100, 3) == range(43, 46)
    assert choose_steps(0, 4, 3) == range(2, 5)
    assert choose_steps(7, 9, 3) == range(8, 10)
    assert len(choose_steps(0, 100, 0)) == len(choose_steps(9, 9, 3)) == 0


def test_a_profile_names_no_other_run(config: TrainConfig) -> None:
    assert default_run_name(config) == default_run_name(config.model_copy(update={"profile": 3}))
