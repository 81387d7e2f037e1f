"""The learning rate of every step, what decays, and when a run stops early."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from tunesmith.config import TrainConfig
from tunesmith.train.checkpoint import Progress
from tunesmith.train.optimizer import build_optimizer
from tunesmith.train.schedule import learning_rate, set_learning_rate
from tunesmith.train.stopping import EarlyStopping

SHAPES = ("cosine", "linear", "constant")

losses = st.floats(0, 20)


@st.composite
def schedules(draw: st.DrawFn, shapes: tuple[str, ...] = SHAPES) -> tuple[TrainConfig, int]:
    """Settings of a learning rate, and the steps of a run."""
    highest = draw(st.floats(1e-6, 1))
    config = TrainConfig(
        learning_rate=highest,
        min_learning_rate=highest * draw(st.floats(0, 1)),
        warmup_ratio=draw(st.floats(0, 1)),
        lr_scheduler_type=draw(st.sampled_from(shapes)),
    )
    return config, draw(st.integers(1, 300))


def rates(config: TrainConfig, total: int) -> list[float]:
    return [learning_rate(step, total, config) for step in range(1, total + 1)]


@given(schedules())
def test_the_learning_rate_warms_up_in_equal_steps_to_its_peak(drawn: tuple[TrainConfig, int]) -> None:
    config, total = drawn
    num_warmup = math.ceil(config.warmup_ratio * total)
    warmup = rates(config, total)[:num_warmup]
    expected = [config.learning_rate * (i + 1) / num_warmup for i in range(num_warmup)]
    assert warmup == pytest.approx(expected, rel=1e-12)


@given(schedules())
def test_the_learning_rate_never_rises_after_warm_up_and_stays_in_its_bounds(
    drawn: tuple[TrainConfig, int],
) -> None:
    config, total = drawn
    after = rates(config, total)[math.ceil(config.warmup_ratio * total) :]
    slack = 1e-12 * config.learning_rate
    assert all(a >= b - slack for a, b in pairwise(after))
    assert all(config.min_learning_rate - slack <= r <= config.learning_rate + slack for r in after)
    assert all(0 < rate <= config.learning_rate + slack for rate in rates(config, total)[:-1])


@given(schedules(("cosine", "linear")))
def test_the_last_step_has_the_lowest_learning_rate(drawn: tuple[TrainConfig, int]) -> None:
    config, total = drawn
    assume(math.ceil(config.warmup_ratio * total) < total)
    assert rates(config, total)[-1] == pytest.approx(config.min_learning_rate, abs=1e-12)
    # A resumed run whose max_steps was lowered doesn't fall below it.
    assert learning_rate(total + 7, total, config) == pytest.approx(config.min_learning_rate, abs=1e-12)


def test_the_shapes_of_the_learning_rate() -> None:
    def shape(name: str) -> list[float]:
        config = TrainConfig(
            learning_rate=1.0, min_learning_rate=0.2, warmup_ratio=0.2, lr_scheduler_type=name
        )
        return rates(config, 10)

    warmup = [0.5, 1.0]
    assert shape("constant") == warmup + [1.0] * 8
    assert shape("linear") == pytest.approx(warmup + [0.2 + 0.8 * (1 - k / 8) for k in range(1, 9)])
    cosine = [0.2 + 0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)]
    assert shape("cosine") == pytest.approx(warmup + cosine)


def test_no_warm_up_starts_near_the_peak() -> None:
    config = TrainConfig(learning_rate=1.0, min_learning_rate=0, warmup_ratio=0, lr_scheduler_type="linear")
    assert rates(config, 4) == [0.75, 0.5, 0.25, 0.0]


def test_matrices_decay_and_vectors_do_not() -> None:
    layer = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    layer[2].weight.requires_grad_(False)
    config = TrainConfig(weight_decay=0.5, learning_rate=0.1)
    optimizer = build_optimizer(layer.parameters(), config)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in layer.named_parameters():
        share = 1 - 0.1 * 0.5 if name == "0.weight" else 1.0
        torch.testing.assert_close(parameter, share * before[name])


def test_a_set_learning_rate_holds_for_every_group() -> None:
    layer = nn.Linear(3, 3)
    optimizer = build_optimizer(layer.parameters(), TrainConfig(weight_decay=0))
    before = [parameter.clone() for parameter in layer.parameters()]
    set_learning_rate(optimizer, 0.25)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, old in zip(layer.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, old - 0.25)  # Adam's first step is the sign's


def test_the_state_made_beforehand_is_that_of_adamws_first_step() -> None:
    layer = nn.Linear(3, 3)
    fresh, used = (
        build_optimizer(layer.parameters(), TrainConfig()),
        torch.optim.AdamW(layer.parameters(), fused=True),
    )
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    used.step()
    for parameter in layer.parameters():
        assert fresh.state[parameter].keys() == used.state[parameter].keys()
        for key, tensor in used.state[parameter].items():
            made = fresh.state[parameter][key]
            assert (made.shape, made.dtype) == (tensor.shape, tensor.dtype)
            assert not made.any()


def observe(evaluations: list[float], threshold: float) -> list[EarlyStopping]:
    """Return the state after each evaluation."""
    states = [EarlyStopping()]
    for loss in evaluations:
        states.append(states[-1].observe(loss, threshold))
    return states[1:]


@given(st.lists(losses, min_size=1), st.floats(0, 1))
def test_the_best_loss_is_the_lowest_even_if_it_fell_by_less_than_the_threshold(
    evaluations: list[float], threshold: float
) -> None:
    assert observe(evaluations, threshold)[-1].best_loss == min(evaluations)


@given(st.lists(losses, max_size=30), st.floats(0, 1))
def test_a_patience_of_zero_never_stops(evaluations: list[float], threshold: float) -> None:
    assert not any(state.is_over(0) for state in observe(evaluations, threshold))


@given(st.lists(losses, min_size=1, max_size=30), st.floats(0, 1), st.integers(1, 5))
def test_a_run_stops_after_as_many_evaluations_without_improvement_as_it_has_patience(
    evaluations: list[float], threshold: float, patience: int
) -> None:
    states = observe(evaluations, threshold)
    improved = [True] + [
        evaluations[i] < min(evaluations[:i]) - threshold for i in range(1, len(evaluations))
    ]
    for i, state in enumerate(states):
        recent = improved[max(0, i + 1 - patience) : i + 1]
        assert state.is_over(patience) == (len(recent) == patience and not any(recent))


def test_stopping_by_an_example() -> None:
    states = observe([3.0, 2.0, 1.95, 1.96, 1.8, 1.79], 0.1)
    assert [state.num_without_improvement for state in states] == [0, 0, 1, 2, 0, 1]
    assert [state.is_over(2) for state in states] == [False, False, False, True, False, False]


def test_falls_smaller_than_the_threshold_add_up_to_none() -> None:
    # Each is held against the lowest so far, so a slow decline runs out of patience.
    states = observe([2.0, 1.95, 1.9, 1.85], 0.1)
    assert [state.num_without_improvement for state in states] == [0, 1, 2, 3]


@given(st.integers(0, 10**6), st.none() | losses, st.lists(losses, max_size=4), st.floats(0, 1))
def test_progress_is_read_back_as_it_was_written(
    step: int, eval_loss: float | None, evaluations: list[float], threshold: float
) -> None:
    progress = Progress(step)
    for loss in evaluations:
        progress = progress.observe(loss, threshold)
    if eval_loss is not None:
        progress = progress.observe(eval_loss, threshold)
        assert progress.eval_loss == eval_loss
    content = progress.to_json()
    assert content["format_version"] == 1
    assert Progress.from_json(json.loads(json.dumps(content))) == progress
