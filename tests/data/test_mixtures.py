"""Data sets with a name, of which some rows are taken, and which are taken more or less often."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.data_sets import prepare_both, read_set, write_rows
from support.tokenizers import build_tokenizer
from tunesmith.config import TrainConfig
from tunesmith.config.data import name_data_sets
from tunesmith.config.layers import dump_settings
from tunesmith.data.batches import BatchPlan, GlobalBatch, Sequences, microbatches_for_rank
from tunesmith.data.epochs import Epochs, plan_epochs
from tunesmith.data.prepare import prepare
from tunesmith.data.sampling import FirstOfShuffle
from tunesmith.data.shares import check_drawn, measure_shares
from tunesmith.data.split import SETS
from tunesmith.errors import DataError
from tunesmith.runs.identity import default_run_name

WHOLE = {"train_split_ratio": 1.0}


@dataclass
class Tokens:
    """A training set of data sets of these sizes; its examples have some 10 to 40 tokens."""

    sizes: tuple[int, ...]
    num_segments = 1

    @property
    def dataset_ids(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)

    @property
    def lengths(self) -> np.ndarray:
        return np.random.default_rng(0).integers(10, 41, sum(self.sizes)).astype(np.int32)

    @property
    def num_examples(self) -> int:
        return sum(self.sizes)


def epochs_of(sizes: tuple[int, ...], weights: list[float], packing: bool = True, seed: int = 3) -> Epochs:
    return Epochs(Tokens(sizes), weights, packing, 100, seed)  # type: ignore[arg-type]


def plan_of(epochs: Epochs, seed: int = 3) -> BatchPlan:
    return BatchPlan(epochs.num_sequences(0), GlobalBatch(2, 3), seed, epochs)


def trained_in(epochs: Epochs, epoch: int) -> Counter[int]:
    """Return how often an epoch trains on each example, as its steps take them."""
    plan = plan_of(epochs)
    counts: Counter[int] = Counter()
    step = 1
    while plan.epoch(step - 1) < epoch:
        step += 1
    while plan.epoch(step - 1) < epoch + 1:
        for microbatch in plan.microbatches(step):
            counts.update(int(e) for i in microbatch for e in epochs.examples(int(i)))
        step += 1
    return counts


# Weights.


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 3)), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2),
)
def test_an_epoch_takes_exactly_as_many_as_the_weight_says(
    sets: list[tuple[int, float]], packing: bool, epoch: int
) -> None:
    sizes, weights = tuple(size for size, _ in sets), [weight for _, weight in sets]
    if not sum(round(size * (weight % 1)) + size * int(weight) for size, weight in sets):
        return
    counts = trained_in(epochs_of(sizes, weights, packing), epoch)
    first = 0
    for size, weight in sets:
        of_set = [counts[example] for example in range(first, first + size)]
        assert sum(of_set) == size * int(weight) + round(size * (weight % 1))
        assert set(of_set) <= {int(weight), int(weight) + 1}
        first += size


def test_two_takes_each_twice_and_a_half_draws_half_anew_each_epoch() -> None:
    epochs = epochs_of((40, 60, 51), [2.0, 0.5, 1.0])
    halves = []
    for epoch in range(3):
        counts = trained_in(epochs, epoch)
        assert [counts[example] for example in range(40)] == [2] * 40
        assert [counts[example] for example in range(100, 151)] == [1] * 51
        drawn = {example for example in range(40, 100) if counts[example]}
        assert len(drawn) == 30 and all(counts[example] == 1 for example in drawn)
        halves.append(drawn)
    assert len(set(map(frozenset, halves))) == 3


def test_over_many_epochs_each_example_is_drawn_as_often() -> None:
    epochs = epochs_of((60,), [0.5], packing=False)
    counts = np.bincount(np.concatenate([epochs.draw(epoch) for epoch in range(400)]), minlength=60)
    assert counts.sum() == 400 * 30
    # 200 each, within 5 standard deviations of 10.
    assert 150 < counts.min() < 200 < counts.max() < 250


def test_the_draw_follows_from_the_seed() -> None:
    draws = [epochs_of((60,), [0.5], seed=seed).draw(1).tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    # Another data set beside it doesn't change what is drawn of the first.
    assert epochs_of((60, 9), [0.5, 0.3]).draw(1)[:30].tolist() == draws[0]


@pytest.mark.parametrize("weights", [[0.5, 1.0], [2.0, 1.0], [1.3, 0.7]])
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_follows_from_seed_and_step_alone(weights: list[float], packing: bool) -> None:
    def microbatches(plan: BatchPlan, epochs: Epochs, step: int) -> list[list[int]]:
        return [
            [int(e) for i in microbatch for e in epochs.examples(int(i))]
            for microbatch in plan.microbatches(step)
        ]

    one, other = epochs_of((70, 50), weights, packing), epochs_of((70, 50), weights, packing)
    whole, resumed = plan_of(one), plan_of(other)
    steps = whole.total_steps(10**6, 3)
    middle = whole.total_steps(10**6, 1.5)  # in the second epoch
    expected = {step: microbatches(whole, one, step) for step in range(1, steps + 1)}
    assert {step: microbatches(resumed, other, step) for step in range(middle, steps + 1)} == {
        step: expected[step] for step in range(middle, steps + 1)
    }
    # Two workers share what one takes.
    for step in range(1, steps + 1):
        shares = [
            expected[step][number]
            for rank in range(2)
            for number in microbatches_for_rank(len(expected[step]), rank, 2)
            if number is not None
        ]
        assert sorted(map(tuple, shares)) == sorted(map(tuple, expected[step]))


@pytest.mark.parametrize("weights", [[0.37, 1.0], [2.0, 1.0]])
def test_steps_and_epochs_count_what_each_epoch_has(weights: list[float]) -> None:
    epochs = epochs_of((300, 50), weights)
    plan = plan_of(epochs)
    sizes = [-(-epochs.num_sequences(epoch) // 6) for epoch in range(4)]
    assert [plan.total_steps(10**6, float(n)) for n in range(1, 5)] == np.cumsum(sizes).tolist()
    assert plan.total_steps(10**6, 2.5) == sizes[0] + sizes[1] + -(-sizes[2] // 2)
    assert plan.total_steps(sizes[0] + 1, 4) == sizes[0] + 1
    for epoch in range(4):
        assert plan.epoch(sum(sizes[:epoch])) == epoch
        assert plan.epoch(sum(sizes[:epoch]) + 1) == epoch + 1 / sizes[epoch]


def test_packs_hold_no_more_than_a_row_and_are_made_anew() -> None:
    epochs = epochs_of((300,), [0.5])
    lengths = Tokens((300,)).lengths
    packs = [epochs.examples(i) for i in range(epochs.first(2))]
    assert max(int(lengths[pack].sum()) for pack in packs) <= 100
    assert sum(int(lengths[pack].sum()) for pack in packs) > 0.9 * 100 * len(packs)


def test_without_weights_the_packs_are_those_that_were_prepared(tmp_path: Path) -> None:
    config, prepared = prepare_both(tmp_path)
    assert plan_epochs(prepared.train, config, packing=True) is None
    assert config.datasets is not None
    weighted = config.model_copy(
        update={"datasets": [it.model_copy(update={"weight": 0.5}) for it in config.datasets]}
    )
    epochs = plan_epochs(prepared.train, weighted, packing=True)
    assert epochs is not None
    sequences = Sequences(prepared.train, True, 0, epochs=epochs)
    ids = [prepared.train.dataset_ids[e] for e in sequences.examples(np.arange(len(sequences)))]
    assert Counter(map(int, ids)) == {
        i: round(int((prepared.train.dataset_ids == i).sum()) / 2) for i in range(2)
    }
    # The prepared data are the same: weights are no part of them.
    assert prepare(weighted, build_tokenizer("chatml"), tmp_path / "datasets").folder == prepared.folder


def test_a_weight_that_draws_nothing_is_refused(tmp_path: Path) -> None:
    _, prepared = prepare_both(tmp_path)
    config = TrainConfig(datasets=[{"dataset_name": "sums.jsonl", "weight": 0.001}, {"dataset_name": "b"}])
    with pytest.raises(DataError, match="draws none of the 48 examples") as caught:
        check_drawn(prepared.train, config.data_sets)
    assert caught.value.hint == "give it at least 0.021, or leave the data set out"


# Rows at most.


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9))
def test_the_first_of_a_shuffle_are_taken_whatever_comes_after(number: int, total: int, seed: int) -> None:
    def take(number: int) -> list[int]:
        first = FirstOfShuffle(number, seed)
        admitted = [row for row in range(total) if first.admits()]
        chosen = first.chosen()
        return (
            admitted
            if chosen is None
            else [row for row, is_in in zip(admitted, chosen, strict=True) if is_in]
        )

    taken = take(number)
    assert len(taken) == min(number, total)
    assert set(take(max(1, number - 1))) <= set(taken)  # of one shuffle


def test_of_many_rows_few_are_written_and_all_are_as_likely() -> None:
    total, number = 40_000, 100
    first = FirstOfShuffle(number, 1)
    admitted = np.flatnonzero([first.admits() for _ in range(total)])
    chosen = first.chosen()
    assert chosen is not None and chosen.sum() == number
    assert len(admitted) < 8000
    assert 0.4 * total < admitted[chosen].mean() < 0.6 * total


def test_max_rows_come_before_the_split_and_follow_from_the_seed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(200)])
    tokenizer = build_tokenizer("byte_bpe")

    def sets_of(**changes: Any) -> list[set[str]]:
        config = TrainConfig(dataset_name=data, num_proc=1, **changes)
        found = prepare(config, tokenizer, tmp_path / "datasets")
        return [{row["output"] for row in read_set(found, name)} for name in SETS]

    with caplog.at_level(logging.INFO):
        sets = sets_of(max_rows=100, train_split_ratio=0.8)
    assert "`rows.jsonl` (train): 100 of its 200 rows, by max_rows" in caplog.text
    assert list(map(len, sets)) == [80, 10, 10]
    taken = set.union(*sets)
    assert taken != set.union(*sets_of(max_rows=100, train_split_ratio=0.8, seed=1))
    assert set.union(*sets_of(max_rows=50)) < taken
    assert sets_of(max_rows=500) == sets_of()


def test_max_rows_are_each_data_set_s_own(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(50)]
    names = [
        write_rows(tmp_path / f"{i}.jsonl", [{"text": f"{i}: {it['text']}"} for it in rows]) for i in range(2)
    ]
    config = TrainConfig(
        datasets=[{"dataset_name": names[0], "max_rows": 7, **WHOLE}, {"dataset_name": names[1], **WHOLE}],
        num_proc=1,
    )
    found = prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
    assert Counter(row["dataset_id"] for row in read_set(found, "training")) == {0: 7, 1: 50}


def test_a_file_that_two_data_sets_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(9)])
    other = write_rows(tmp_path / "other.jsonl", [{"text": f"other {i}"} for i in range(9)])
    again = str(tmp_path / "sub" / ".." / "rows.jsonl")
    (tmp_path / "sub").mkdir()
    for names, told in (((path, other), 0), ((path, again), 1)):
        caplog.clear()
        config = TrainConfig(datasets=[{"dataset_name": name, **WHOLE} for name in names], num_proc=1)
        prepare(config, build_tokenizer("byte_bpe"), tmp_path / "datasets")
        assert caplog.text.count(f"is read twice, as `{path}` and as `{again}`") == told


# Names and defaults.


def test_data_sets_are_called_by_their_name_else_by_their_file_or_place() -> None:
    def names(*data_sets: dict[str, Any]) -> list[str]:
        return name_data_sets(TrainConfig(datasets=[*data_sets, {"dataset_name": "last"}]).data_sets)

    paths = ["a/my rows.jsonl.gz", "org/Qwen2.5-data", "s3://bucket/folder/", "b/x.csv"]
    assert names(*({"dataset_name": path} for path in paths)) == [
        "my_rows",
        "Qwen2.5-data",
        "folder",
        "x",
        "last",
    ]
    assert names(
        {"dataset_name": "a/x.csv"}, {"dataset_name": "x.json"}, {"dataset_name": "y", "name": "x"}
    ) == [
        "x_2",
        "x_3",
        "x",
        "last",
    ]
    with pytest.raises(ValueError, match="two of the `datasets` have the name `x`"):
        names({"dataset_name": "a", "name": "x"}, {"dataset_name": "b", "name": "x"})
    with pytest.raises(ValueError, match="name"):
        names({"dataset_name": "a", "name": "two words"})


def test_at_their_defaults_the_settings_rename_nothing(tmp_path: Path) -> None:
    plain = {"dataset_name": "rows.jsonl"}
    defaults = {"name": None, "max_rows": None, "weight": 1.0}
    for one, other in (
        (TrainConfig(**plain), TrainConfig(**plain, **defaults)),
        (TrainConfig(datasets=[plain, plain]), TrainConfig(datasets=[{**plain, **defaults}, plain])),
    ):
        assert default_run_name(one) == default_run_name(other)
        assert dump_settings(one) == dump_settings(other)
        renamed = {
            default_run_name(one.model_copy(update={name: value}))
            for name, value in (("weight", 2.0), ("max_rows", 5))
        }
        assert len(renamed | {default_run_name(one)}) == 3


def test_shares_count_each_row_once_however_its_examples_lie(tmp_path: Path) -> None:
    _, prepared = prepare_both(tmp_path)
    config = TrainConfig(datasets=[{"dataset_name": "a", "weight": 2.0}, {"dataset_name": "b"}])
    tokens = replace(
        prepared.train,
        lengths=np.array([10, 5, 10, 5, 20], dtype=np.int32),
        num_trained=np.array([1, 2, 3, 4, 5], dtype=np.int32),
        rows=np.array([3, 0, 3, 1, 2]),
        dataset_ids=np.array([1, 0, 1, 0, 0], dtype=np.int32),
    )
    first, second = measure_shares(tokens, config.data_sets)
    assert (first.rows, first.examples, first.tokens, first.trained_tokens) == (6, 6, 60, 22)
    assert (second.rows, second.examples, second.tokens, second.trained_tokens) == (1, 2, 20, 4)
    assert (first.row_share, first.token_share) == (6 / 7, 0.75)
