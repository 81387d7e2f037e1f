"""Attention inside examples equals attention under a mask, and is left to models that want nothing more of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.model.kernels import attention
from tunesmith.model.kernels.attention import (
    Trial,
    attend_on_trial,
    attend_within_examples,
    on_trial,
)

MODULE = SimpleNamespace(is_causal=True)
WIDTH = 8


def random_states(num_heads: int, num_groups: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads = (num_heads, num_groups, num_groups)
    return [
        torch.randn(1, count, length, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
        for count in heads
    ]


def attend(
    states: list[Tensor],
    lengths: list[int],
    way: Callable[..., Any] = attend_within_examples,
    **options: object,
) -> Tensor:
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    output, _ = way(MODULE, *states, None, cu_seq_lens_q=starts, max_length_q=max(lengths), **options)
    return output


def attend_under_mask(
    states: list[Tensor], lengths: list[int], scale: float, window: int | None = None
) -> Tensor:
    """Return the same from the definition: a square of scores, and a mask."""
    query, key, value = states
    groups = query.shape[1] // key.shape[1]
    key, value = (kept.repeat_interleave(groups, 1) for kept in (key, value))
    example = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (example[:, None] == example) & torch.ones(len(example), len(example), dtype=torch.bool).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("longest_kept", [512, 0])
@given(
    lengths=st.lists(st.integers(1, 12) | st.integers(100, 300), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (3, 1)]),
    scaling=st.sampled_from([None, 0.3]),
    window=st.sampled_from([None, 1, 5, 64, 200]),
)
@settings(max_examples=60, deadline=None)
def test_it_equals_attention_under_a_mask(
    longest_kept: int, lengths: list[int], heads: tuple[int, int], scaling: float | None, window: int | None
) -> None:
    ours, theirs = random_states(*heads, sum(lengths)), random_states(*heads, sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LONGEST_KEPT", longest_kept)
        output = attend(ours, lengths, scaling=scaling, sliding_window=window)
    expected = attend_under_mask(theirs, lengths, WIDTH**-0.5 if scaling is None else scaling, window)
    # The scores are computed in float32.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-4)


def test_in_bfloat16_scores_are_as_exact_as_in_float32() -> None:
    lengths = [130, 40, 90]
    states = [kept.detach().bfloat16() for kept in random_states(4, 2, sum(lengths))]
    states[0] *= 30  # scores so large that rounded ones would pick other keys
    output = attend(states, lengths)
    expected = attend_under_mask([kept.double() for kept in states], lengths, WIDTH**-0.5)
    torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.02)
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.1},
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"is_causal": False},
    ],
    ids=str,
)
def test_what_it_does_not_compute_is_refused(options: dict[str, object]) -> None:
    states = random_states(4, 2, 9)
    with pytest.raises(NotImplementedError):
        attend(states, [5, 4], **options)
    trial = Trial()
    with on_trial(trial):
        tried = attend(states, [5, 4], attend_on_trial, **options)
    assert tried.shape == (1, 9, 4, WIDTH)
    assert tried.isnan().all()
    assert len(trial.problems) == 1
    assert attend(states, [5, 4], attend_on_trial, **options).isnan().all()


def test_on_trial_it_computes_the_same() -> None:
    states, trial = random_states(4, 2, 9), Trial()
    with on_trial(trial):
        tried = attend(states, [5, 4], attend_on_trial)
    assert torch.equal(tried, attend(states, [5, 4]))
    assert not trial.problems


def test_on_trial_windows_are_noted() -> None:
    states, trial = random_states(4, 2, 9), Trial()
    with on_trial(trial):
        for window in (None, 3, 7):
            attend(states, [5, 4], attend_on_trial, sliding_window=window)
    assert trial.windows == {3, 7}


def test_a_window_that_reaches_over_every_example_changes_nothing() -> None:
    states = random_states(4, 2, 9)
    assert torch.equal(attend(states, [5, 4], sliding_window=5), attend(states, [5, 4]))


def test_tiles_reach_no_further_than_the_window() -> None:
    """Scores that a window hides aren't computed: of 1,024 tokens and a window of 128, three of eight tiles."""
    states = random_states(1, 1, 1024)
    with FlopCounterMode(display=False) as whole:
        attend(states, [1024])
    with FlopCounterMode(display=False) as windowed:
        attend(states, [1024], sliding_window=128)
    assert windowed.get_total_flops() < 0.5 * whole.get_total_flops()
