"""Never lose a step: real Ray, real kills."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.commands import Command
from support.runs import losses, small_config, write_rows
from support.tiny_models import save_model
from support.tokenizers import build_tokenizer
from tunesmith.api import fine_tune
from tunesmith.config import TrainConfig
from tunesmith.errors import RunError
from tunesmith.model.adapters.lora import ADAPTER_WEIGHTS
from tunesmith.runs.folder import RunDir
from tunesmith.runs.metrics_log import iterate_metrics, newest_attempt

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STEPS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("resume")
    # Large enough that a step takes some tenths of a second, so that there is something to kill.
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    model = save_model(folder / "tiny", build_tokenizer("byte_bpe"), "llama", **shape)
    return small_config(
        model,
        write_rows(folder / "rows.jsonl", 400),
        folder / "uninterrupted",
        max_steps=NUM_STEPS,
        num_workers=2,
        learning_rate=1e-3,
        save_steps=4,
        eval_steps=10,
        early_stopping_patience=0,
        max_failures=5,
    )


@pytest.fixture(scope="module")
def uninterrupted(config: TrainConfig) -> RunDir:
    command = Command(config)
    assert command.wait() == 0, command.output()
    return command.run


def in_home(config: TrainConfig, name: str) -> TrainConfig:
    assert config.home is not None
    return config.model_copy(update={"home": config.home.with_name(name)})


def assert_same_result(run: RunDir, expected: RunDir) -> None:
    assert losses(run) == losses(expected)
    assert losses(run, "eval_loss") == losses(expected, "eval_loss")
    ours, theirs = (load_file(r.final_path / ADAPTER_WEIGHTS) for r in (run, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_workers_and_drivers_lose_no_step(config: TrainConfig, uninterrupted: RunDir) -> None:
    points = random.Random(20261122)
    config = in_home(config, "killed")
    command = Command(config)
    command.wait_for_step(points.randint(5, 12), attempt=1)
    command.kill_a_worker(points.randint(0, 1))
    command.wait_for_step(points.randint(14, 20), attempt=2)
    command.kill()

    command = Command(config)
    attempt = newest_attempt(command.run) + 1
    command.wait_for_step(points.randint(24, 30), attempt)
    command.kill_a_worker(points.randint(0, 1))
    assert command.wait() == 0, command.output()

    starts = [line for line in iterate_metrics(command.run.metrics_path) if line.get("event") == "start"]
    assert len(starts) == 4
    assert all(line["step"] >= 4 for line in starts[1:]), "a resumed attempt starts at a checkpoint"
    assert_same_result(command.run, uninterrupted)


def test_sigterm_saves_and_the_same_command_goes_on(config: TrainConfig, uninterrupted: RunDir) -> None:
    config = in_home(config, "stopped")
    command = Command(config)
    command.wait_for_step(6, attempt=1)

    second = Command(config)
    assert second.wait() == 2
    assert f"held by process {command.process.pid}" in second.output()

    command.signal(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM
    stopped = command.run.latest_checkpoint()
    assert stopped is not None
    assert max(losses(command.run)) == stopped.step < NUM_STEPS, "the last trained step is saved"
    assert "tunesmith train" in command.output()

    command = Command(config)
    assert command.wait() == 0, command.output()
    assert_same_result(command.run, uninterrupted)


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(config: TrainConfig) -> None:
    config = in_home(config, "interrupted")
    command = Command(config)
    command.wait_until(lambda: command.run.latest_checkpoint(), "first checkpoint")
    command.signal(signal.SIGINT)
    time.sleep(1)  # within half a second it would be one request, signalled twice
    command.signal(signal.SIGINT)
    assert command.wait() == 130
    assert "Traceback" not in command.output()
    checkpoint = command.run.latest_checkpoint()
    assert checkpoint is not None
    assert load_file(checkpoint.path / ADAPTER_WEIGHTS)
    assert not command.run.lease_path.exists()


def test_a_finished_run_is_refused_until_max_steps_is_raised(
    config: TrainConfig, uninterrupted: RunDir
) -> None:
    command = Command(config)
    assert command.wait() == 2
    assert "is finished" in command.output()
    assert "hint: raise --max_steps above 40" in command.output()
    command = Command(config, f"--max_steps={NUM_STEPS + 2}")
    assert command.wait() == 0, command.output()
    assert set(losses(command.run)) == set(range(1, NUM_STEPS + 3))


def test_the_run_of_other_settings_is_refused_by_name(config: TrainConfig, uninterrupted: RunDir) -> None:
    with pytest.raises(RunError, match=r"`lora_rank` \(4 → 8\)"):
        fine_tune(config.model_copy(update={"lora_rank": 8}))


def test_a_failed_training_shows_its_cause_first(config: TrainConfig, tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    shutil.copytree(config.model.source, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    changes = {"model_path": model, "max_failures": 0}
    command = Command(in_home(config, "failed").model_copy(update=changes))
    assert command.wait() == 2
    (error,) = (line for line in command.output().splitlines() if line.startswith("error:"))
    assert error.endswith("lack weights: model.norm.weight …")
    assert "Traceback" not in command.output()
