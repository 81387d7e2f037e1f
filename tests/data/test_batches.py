"""Which sequences each step trains on, how workers share them, and what a microbatch holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.runs import small_config, start
from tunesmith.data.batches import (
    FLAT_MULTIPLE,
    Batch,
    BatchPlan,
    Counts,
    GlobalBatch,
    Sequences,
    collate,
    empty_batch,
    microbatch_seed,
    microbatches_for_rank,
)
from tunesmith.data.prepare import open_prepared

PAD = 999

plans = st.builds(
    BatchPlan,
    num_sequences=st.integers(1, 300),
    global_batch=st.builds(
        GlobalBatch, microbatches=st.integers(1, 9), sequences_per_microbatch=st.integers(1, 9)
    ),
    seed=st.integers(0, 2**31 - 1),
)


@given(plans, st.integers(0, 3))
def test_an_epoch_holds_every_sequence_once(plan: BatchPlan, epoch: int) -> None:
    assert sorted(sequences_of_epoch(plan, epoch)) == list(range(plan.num_sequences))


@given(plans, st.integers(1, 8))
def test_an_epoch_holds_every_sequence_once_whatever_the_number_of_workers(
    plan: BatchPlan, world_size: int
) -> None:
    trained = []
    for step in range(1, plan.steps_per_epoch + 1):
        microbatches = plan.microbatches(step)
        for rank in range(world_size):
            numbers = microbatches_for_rank(len(microbatches), rank, world_size)
            trained += [int(i) for n in numbers if n is not None for i in microbatches[n]]
    assert sorted(trained) == list(range(plan.num_sequences))


@given(plans)
def test_all_steps_are_whole_but_an_epoch_s_last(plan: BatchPlan) -> None:
    sizes = [list(map(len, plan.microbatches(step))) for step in range(1, plan.steps_per_epoch + 1)]
    size = plan.global_batch.sequences_per_microbatch
    assert sizes[:-1] == [[size] * plan.global_batch.microbatches] * (plan.steps_per_epoch - 1)
    left = plan.num_sequences - (plan.steps_per_epoch - 1) * plan.global_batch.sequences
    assert 0 < sum(sizes[-1]) == left <= plan.global_batch.sequences
    assert all(0 < number <= size for number in sizes[-1])
    assert len(sizes[-1]) == math.ceil(left / size)


@given(plans, st.integers(1, 1000), st.integers(1, 1000))
def test_a_batch_follows_from_seed_and_step_alone(plan: BatchPlan, step: int, other: int) -> None:
    again = BatchPlan(plan.num_sequences, plan.global_batch, plan.seed)
    expected = [microbatch.tolist() for microbatch in plan.microbatches(step)]
    again.microbatches(other)  # what was asked before doesn't matter
    assert [microbatch.tolist() for microbatch in again.microbatches(step)] == expected


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 5), st.integers(0, 5))
def test_other_epochs_and_other_seeds_come_in_another_order(
    seed: int, other_seed: int, epoch: int, other_epoch: int
) -> None:
    plan, other = (BatchPlan(100, GlobalBatch(3, 4), number) for number in (seed, other_seed))
    same = (seed, epoch) == (other_seed, other_epoch)
    assert (sequences_of_epoch(plan, epoch) == sequences_of_epoch(other, other_epoch)) == same


def test_the_order_is_shuffled() -> None:
    order = sequences_of_epoch(BatchPlan(1000, GlobalBatch(1, 10), 0), 0)
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.1


@given(plans, st.integers(1, 2000), st.none() | st.floats(0.01, 20))
def test_a_run_ends_at_max_steps_or_at_its_epochs(
    plan: BatchPlan, max_steps: int, num_train_epochs: float | None
) -> None:
    total = plan.total_steps(max_steps, num_train_epochs)
    if num_train_epochs is None:
        assert total == max_steps
        return
    assert 1 <= total <= max_steps
    if total < max_steps:
        assert plan.epoch(total) >= num_train_epochs - 1e-9
        assert plan.epoch(total - 1) < num_train_epochs or total == 1


def test_a_share_of_an_epoch_is_not_rounded_up_twice() -> None:
    plan = BatchPlan(40, GlobalBatch(2, 2), seed=0)
    assert [plan.total_steps(100, epochs) for epochs in (0.01, 0.5, 1.1, 1.11, 2)] == [1, 5, 11, 12, 20]


@given(plans, st.integers(0, 4))
def test_epochs_are_counted_from_steps(plan: BatchPlan, epoch: int) -> None:
    assert plan.epoch(epoch * plan.steps_per_epoch) == epoch
    assert plan.total_steps(10**9, epoch + 1) == (epoch + 1) * plan.steps_per_epoch


@given(st.integers(1, 50), st.integers(1, 16))
def test_workers_share_the_microbatches_with_equally_many_forwards(num: int, world_size: int) -> None:
    shares = [microbatches_for_rank(num, rank, world_size) for rank in range(world_size)]
    assert sorted(n for share in shares for n in share if n is not None) == list(range(num))
    assert {len(share) for share in shares} == {math.ceil(num / world_size)}
    assert all(share.count(None) <= 1 for share in shares)


def test_the_random_seed_of_a_microbatch_follows_from_its_place_not_from_the_worker() -> None:
    places = [(seed, step, number) for seed in (0, 1, 16257) for step in (1, 2, 900) for number in range(5)]
    seeds = [microbatch_seed(*place) for place in places]
    assert seeds == [microbatch_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    for world_size in (1, 2, 3):
        of_numbers = {
            number: microbatch_seed(16257, 2, number)
            for rank in range(world_size)
            for number in microbatches_for_rank(5, rank, world_size)
            if number is not None
        }
        assert [of_numbers[n] for n in range(5)] == [microbatch_seed(16257, 2, n) for n in range(5)]
    torch.manual_seed(max(seeds))  # torch takes them


def sequences_of_epoch(plan: BatchPlan, epoch: int) -> list[int]:
    steps = range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1)
    return [int(i) for step in steps for microbatch in plan.microbatches(step) for i in microbatch]


@dataclass
class Tokens:
    """Labelled examples in memory, with packs; each token's id is unique, so that its origin shows."""

    trained: list[list[bool]]
    packs: list[np.ndarray]
    num_segments = 1

    @property
    def num_examples(self) -> int:
        return len(self.trained)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(example) for example in self.trained])

    @property
    def num_trained(self) -> np.ndarray:
        return np.array([sum(example) for example in self.trained])

    @property
    def segments(self) -> np.ndarray:
        return self.lengths.reshape(-1, self.num_segments)

    def segment(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.example(index)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        first = 1000 + 100 * index
        return np.arange(first, first + len(self.trained[index])), np.array(self.trained[index])


examples = st.lists(st.booleans(), min_size=1, max_size=9).map(lambda trained: [False, *trained])


@st.composite
def token_sets(draw: st.DrawFn) -> tuple[Tokens, list[list[int]]]:
    """Examples, and some rows of them: packs, or one example a row."""
    trained = draw(st.lists(examples, min_size=1, max_size=8))
    order = draw(st.permutations(range(len(trained))))
    cuts = sorted(draw(st.sets(st.integers(1, len(trained)))) | {len(trained)})
    rows = [order[start:end] for start, end in zip([0, *cuts[:-1]], cuts, strict=True)]
    return Tokens(trained, [np.array(row) for row in rows]), rows


@given(token_sets())
def test_a_microbatch_holds_its_examples_behind_one_another(drawn: tuple[Tokens, list[list[int]]]) -> None:
    tokens, rows = drawn
    batch = collate(tokens, rows, PAD)
    longest = max(sum(len(tokens.trained[i]) for i in row) for row in rows)
    assert batch.input_ids_BT.shape == batch.position_ids_BT.shape == (len(rows), longest)
    for b, row in enumerate(rows):
        ids = [int(token) for i in row for token in tokens.example(i)[0]]
        positions = [position for i in row for position in range(len(tokens.trained[i]))]
        assert batch.input_ids_BT[b].tolist() == ids + [PAD] * (longest - len(ids))
        assert batch.position_ids_BT[b, : len(ids)].tolist() == positions


@given(token_sets())
def test_each_trained_token_is_predicted_once_from_the_token_before_it_in_its_example(
    drawn: tuple[Tokens, list[list[int]]],
) -> None:
    tokens, rows = drawn
    batch = collate(tokens, rows, PAD)
    flat = batch.input_ids_BT.flatten()
    pairs = list(zip(flat[batch.positions_N].tolist(), batch.targets_N.tolist(), strict=True))
    expected = []
    for row in rows:
        for i in row:
            ids, trained = tokens.example(i)
            expected += [(ids[t - 1], ids[t]) for t in range(1, len(ids)) if trained[t]]
    # Ids tell examples apart: no pair crosses a border, and no padding is in one.
    assert pairs == expected
    assert flat[batch.positions_N + 1].tolist() == batch.targets_N.tolist()
    assert PAD not in batch.targets_N.tolist()
    assert len(pairs) == sum(tokens.num_trained)


@given(token_sets())
def test_padding_belongs_to_no_example(drawn: tuple[Tokens, list[list[int]]]) -> None:
    tokens, rows = drawn
    batch = collate(tokens, rows, PAD)
    for b, row in enumerate(rows):
        length = sum(len(tokens.trained[i]) for i in row)
        padding = batch.position_ids_BT[b, length:].tolist()
        # Behind a pack a new example begins; behind a lone one it goes on, as nothing sees it there.
        first = length if len(row) == 1 else 0
        assert padding == list(range(first, first + len(padding)))


@given(token_sets())
def test_flattened_all_examples_are_in_one_row_and_its_padding_is_an_example_of_its_own(
    drawn: tuple[Tokens, list[list[int]]],
) -> None:
    tokens, rows = drawn
    indices = np.arange(len(rows))
    flat = Sequences(tokens, True, PAD, flatten=True).collate(indices)
    batch = Sequences(tokens, True, PAD).collate(indices)
    lengths = [len(tokens.trained[i]) for row in rows for i in row]
    num_padding = -sum(lengths) % FLAT_MULTIPLE
    assert flat.input_ids_BT.shape == (1, sum(lengths) + num_padding)
    assert (flat.input_ids_BT[0] == PAD).nonzero().squeeze(1).tolist() == [
        *range(sum(lengths), sum(lengths) + num_padding)
    ]
    assert flat.targets_N.tolist() == batch.targets_N.tolist()
    assert bool((flat.positions_N < sum(lengths)).all())
    told = [*lengths, num_padding] if num_padding else lengths
    assert flat.starts.tolist() == np.cumsum([0, *told]).tolist()
    assert flat.longest == max(told)
    starts = (flat.position_ids_BT[0] == 0).nonzero().squeeze(1).tolist()
    assert starts == flat.starts[:-1].tolist()
    alone = Sequences(tokens, False, PAD, flatten=True).collate(np.arange(tokens.num_examples))
    assert alone.input_ids_BT.shape == (1, sum(tokens.lengths) + num_padding)


@given(token_sets())
def test_counts_leave_padding_out(drawn: tuple[Tokens, list[list[int]]]) -> None:
    tokens, rows = drawn
    for packing, number in ((True, len(rows)), (False, tokens.num_examples)):
        sequences = Sequences(tokens, packing, PAD)
        assert len(sequences) == number
        counts = sequences.count(np.arange(number))
        assert counts == Counts(sum(tokens.lengths), sum(tokens.num_trained), tokens.num_examples)
        assert sorted(sequences.examples(np.arange(number))) == list(range(tokens.num_examples))


def test_an_empty_batch_is_a_forward_without_targets() -> None:
    batch = empty_batch(PAD)
    assert batch.input_ids_BT.tolist() == [[PAD, PAD]]
    assert len(batch.positions_N) == len(batch.targets_N) == 0
    assert isinstance(batch.to(torch.device("cpu")), Batch)


def test_sequences_of_real_prepared_data_name_their_lines(
    model_of: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    prepared = open_prepared(start(small_config(model_of("llama"), rows, tmp_path)).prepared_path)
    packed, padded = (Sequences(prepared.train, packing, PAD) for packing in (True, False))
    for sequences in (packed, padded):
        everything = np.arange(len(sequences))
        assert sequences.source_rows(everything) == list(range(54))
        stats = prepared.stats.train
        assert sequences.count(everything) == Counts(stats.tokens, stats.trained_tokens, 54)
        batch = sequences.collate(everything[:5])
        assert len(batch.targets_N) == sequences.count(everything[:5]).trained_tokens
    assert len(padded) == 54
    assert len(packed) < 40
    with pytest.raises(IndexError):
        padded.collate(np.array([54]))
