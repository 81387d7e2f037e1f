"""When the loop logs, evaluates, saves and ends: functions of values alone."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config import TrainConfig
from tunesmith.train.checkpoint import Progress
from tunesmith.train.decisions import (
    Ending,
    describe_ending,
    explain_divergence,
    find_ending,
    is_evaluated,
    is_logged,
    is_saved,
)
from tunesmith.train.stopping import EarlyStopping

NUM_STEPS = 7


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model_path": "m", "dataset_name": "d", "max_steps": NUM_STEPS, **changes})


@pytest.mark.parametrize(("interval", "steps"), [(1, {*range(3, 8)}), (3, {3, 6, 7}), (100, {3, 7})])
def test_an_attempt_logs_its_first_step_and_the_run_its_last(interval: int, steps: set[int]) -> None:
    config = settings(logging_steps=interval)
    assert {step for step in range(3, NUM_STEPS + 1) if is_logged(step, 3, NUM_STEPS, config)} == steps


@pytest.mark.parametrize(("interval", "steps"), [(1, {*range(1, 8)}), (3, {3, 6, 7}), (0, {7})])
def test_the_last_step_is_evaluated_whatever_the_interval(interval: int, steps: set[int]) -> None:
    config = settings(eval_steps=interval)
    assert {step for step in range(1, NUM_STEPS + 1) if is_evaluated(step, NUM_STEPS, config)} == steps


def test_a_checkpoint_is_due_by_the_interval_for_the_best_and_at_the_end() -> None:
    config = settings(save_steps=3)
    before = Progress(3, stopping=EarlyStopping(2.0))
    assert [step for step in range(1, 8) if is_saved(Progress(step), Progress(), None, config)] == [3, 6]
    better, worse = (Progress(4, stopping=before.stopping).observe(loss, 0.0) for loss in (1.9, 2.1))
    assert is_saved(better, before, None, config)
    assert not is_saved(worse, before, None, config)
    assert is_saved(worse, before, Ending("stopped", ""), config)
    assert not is_saved(Progress(6), Progress(5), None, settings(save_steps=0))


def test_a_training_ends_by_steps_patience_or_request_whichever_it_meets_first() -> None:
    config = settings(early_stopping_patience=2)
    impatient = EarlyStopping(2.0, num_without_improvement=2)
    assert find_ending(Progress(6), NUM_STEPS, config) is None
    assert find_ending(Progress(6), NUM_STEPS, config, stop_requested=True) == Ending(
        "stopped", "on request, at step 6 of 7"
    )
    early = find_ending(Progress(6, stopping=impatient), NUM_STEPS, config, stop_requested=True)
    assert early is not None
    assert (early.event, early.setting) == ("finished", "early_stopping_patience")
    last = find_ending(Progress(7, stopping=impatient), NUM_STEPS, config, stop_requested=True)
    assert last == Ending("finished", "step 7 of 7", "max_steps")
    of_epochs = find_ending(Progress(5), 5, config)
    assert of_epochs is not None
    assert of_epochs.setting == "num_train_epochs"


def test_a_finished_training_says_what_a_later_attempt_must_know() -> None:
    ending = Ending("finished", "", "max_steps")
    assert describe_ending(ending, 1.5, settings(early_stopping_patience=4)) == {
        "setting": "max_steps",
        "epoch": 1.5,
        "max_steps": 7,
        "early_stopping_patience": 4,
    }
    assert describe_ending(Ending("stopped", ""), 1.5, settings()) == {}


def test_a_divergence_names_the_lines_that_it_was_trained_on() -> None:
    ending = explain_divergence(4, float("nan"), 2.0, [*range(40)])
    assert ending.event == "failed"
    assert ending.message.startswith("step 4: loss nan, gradient norm 2; the weights are those of step 3.")
    assert ending.message.endswith(" 31, 32, … of training.jsonl")
