"""The batch of step k, as a pure function of the seed and k.

Shapes: B sequences, T tokens of the longest, N trained positions.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.data.draws import Draws
    from tunesmith.data.epochs import Epochs
    from tunesmith.data.token_set import Packs, TokenSet

# Lengths that repeat: allocators use their blocks again, and kernels and compiled code are made once.
FLAT_MULTIPLE = 64


@dataclass(frozen=True)
class Batch:
    """One microbatch.

    `positions_N` index the flattened (B·T) positions whose next token is trained; `targets_N` are those
    next tokens. There is no attention mask: position ids that restart mark the segments of a pack, and
    padding comes last, where nothing sees it.
    """

    input_ids_BT: Tensor
    position_ids_BT: Tensor
    positions_N: Tensor
    targets_N: Tensor
    starts: Tensor
    """Where the segments begin in the flattened positions, and their end; int32."""
    longest: int
    """Tokens of the longest segment."""
    num_trained: tuple[int, ...] = ()
    """Trained positions of each segment, in order; padding is none."""
    draw_keys_BT: Tensor | None = None
    """What the dropout of each token follows from; None where nothing is dropped, or torch's generator draws."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`; the host doesn't wait for a GPU's copy."""
        return Batch(
            _send(self.input_ids_BT, device),
            _send(self.position_ids_BT, device),
            _send(self.positions_N, device),
            _send(self.targets_N, device),
            _send(self.starts, device),
            self.longest,
            self.num_trained,
            None if self.draw_keys_BT is None else _send(self.draw_keys_BT, device),
        )


@dataclass(frozen=True)
class Counts:
    """What a global batch or a validation set holds; padding is not counted."""

    tokens: int
    trained_tokens: int
    examples: int


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step takes, fixed when a run first starts."""

    microbatches: int
    sequences_per_microbatch: int

    @property
    def sequences(self) -> int:
        return self.microbatches * self.sequences_per_microbatch


@dataclass(frozen=True)
class BatchPlan:
    """Which sequences each step trains on. Steps count from 1.

    An epoch is a seeded permutation of the sequences; its last step is smaller where they don't divide.
    With `epochs`, each has sequences of its own, and `num_sequences` is how many the first has.
    """

    num_sequences: int
    global_batch: GlobalBatch
    seed: int
    epochs: Epochs | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_of(0)

    def microbatches(self, step: int) -> list[np.ndarray]:
        """Return the step's microbatches, each the int64 indices of its sequences."""
        epoch, step_in_epoch = self._locate(step - 1)
        order = _permutation(self._count(epoch), self.seed, epoch)
        start = step_in_epoch * self.global_batch.sequences
        rows = order[start : start + self.global_batch.sequences]
        if self.epochs is not None:
            rows = rows + self.epochs.first(epoch)
        size = self.global_batch.sequences_per_microbatch
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def epoch(self, step: int) -> float:
        """Return how many epochs are done after `step` steps."""
        if self.epochs is None:
            return step / self.steps_per_epoch
        epoch, step_in_epoch = self._locate(step)
        return epoch + step_in_epoch / self._steps_of(epoch)

    def total_steps(self, max_steps: int, num_train_epochs: float | None) -> int:
        """Return the steps of the run: `max_steps` or the epochs, whichever ends first."""
        if num_train_epochs is None:
            return max_steps
        whole, steps = 0, 0
        if self.epochs is not None:
            while whole + 1 <= num_train_epochs and steps < max_steps:
                steps += self._steps_of(whole)
                whole += 1
        if whole < num_train_epochs and steps < max_steps:
            # 1.1 × 10 is 11.000000000000002, which is not a twelfth step.
            steps += math.ceil((num_train_epochs - whole) * self._steps_of(whole) - 1e-9)
        return min(max_steps, max(1, steps))

    def _locate(self, steps: int) -> tuple[int, int]:
        """Return the epoch that stands after so many steps, and how many of them were its own."""
        if self.epochs is None:
            return divmod(steps, self.steps_per_epoch)
        while self._steps_before[-1] <= steps:
            self._steps_before.append(self._steps_before[-1] + self._steps_of(len(self._steps_before) - 1))
        epoch = bisect_right(self._steps_before, steps) - 1
        return epoch, steps - self._steps_before[epoch]

    @cached_property
    def _steps_before(self) -> list[int]:
        """The steps before each epoch, as far as they have been asked for."""
        return [0]

    def _count(self, epoch: int) -> int:
        return self.num_sequences if self.epochs is None else self.epochs.num_sequences(epoch)

    def _steps_of(self, epoch: int) -> int:
        return math.ceil(self._count(epoch) / self.global_batch.sequences)


class Sequences:
    """The rows that are trained on: packs of a token set, or its examples one by one (padded).

    With `epochs`, those of each epoch, counted through.
    """

    def __init__(
        self,
        tokens: TokenSet,
        packing: bool,
        pad_token_id: int,
        flatten: bool = False,
        epochs: Epochs | None = None,
    ) -> None:
        self.tokens = tokens
        self.packing = packing
        self.pad_token_id = pad_token_id
        # Attention that tells examples apart by where they begin wants them in one row, without padding.
        self._flatten = flatten
        self.epochs = epochs

    def repack(self, packs: Packs) -> Sequences:
        """Return the same examples in other packs."""
        return Sequences(replace(self.tokens, packs=packs), True, self.pad_token_id, self._flatten)

    def __len__(self) -> int:
        """Return how many there are: in the first epoch, where each has its own."""
        if self.epochs is not None:
            return self.epochs.num_sequences(0)
        return len(self.tokens.packs) if self.packing else self.tokens.num_examples

    def examples(self, sequences: np.ndarray) -> list[int]:
        """Return the indices of the examples in these sequences."""
        if self.epochs is not None:
            return [int(example) for i in sequences for example in self.epochs.examples(int(i))]
        if not self.packing:
            return [int(i) for i in sequences]
        return [int(example) for i in sequences for example in self.tokens.packs[int(i)]]

    def source_rows(self, sequences: np.ndarray) -> list[int]:
        """Return the lines of the `.jsonl` (from 0) that these sequences come from."""
        return sorted({int(self.tokens.rows[example]) for example in self.examples(sequences)})

    def count(self, sequences: np.ndarray) -> Counts:
        """Return what these sequences hold."""
        examples = self.examples(sequences)
        return Counts(
            int(self.tokens.lengths[examples].sum()),
            int(self.tokens.num_trained[examples].sum()),
            len(examples),
        )

    def collate(self, sequences: np.ndarray, draws: Draws | None = None) -> Batch:
        """Return the microbatch of these sequences, padded to the longest; `draws` give the keys of its dropout."""
        rows = [self._segments(sequences[i : i + 1]) for i in range(len(sequences))]
        if self._flatten:
            row = list(itertools.chain(*rows))
            return collate(self.tokens, [row], self.pad_token_id, FLAT_MULTIPLE, draws)
        if not self.packing:  # each by itself: the model may not keep apart what shares a row
            rows = [[segment] for row in rows for segment in row]
        return collate(self.tokens, rows, self.pad_token_id, draws=draws)

    def _segments(self, sequences: np.ndarray) -> list[int]:
        each = self.tokens.num_segments
        return [
            segment
            for example in self.examples(sequences)
            for segment in range(example * each, (example + 1) * each)
        ]


def collate(
    tokens: TokenSet,
    rows: Sequence[Sequence[int]],
    pad_token_id: int,
    multiple: int = 1,
    draws: Draws | None = None,
) -> Batch:
    """Put each row's segments behind one another, positions restarting, and pad to the longest row.

    Its length is rounded up to a `multiple`; one row's padding is a segment of its own, of which nothing is trained.
    """
    lengths = tokens.segments.reshape(-1)
    num_tokens = max(sum(int(lengths[segment]) for segment in row) for row in rows)
    num_tokens = math.ceil(num_tokens / multiple) * multiple
    input_ids_BT = np.full((len(rows), num_tokens), pad_token_id, dtype=np.int64)
    position_ids_BT = np.zeros((len(rows), num_tokens), dtype=np.int64)
    segments_BT = np.full((len(rows), num_tokens), -1)
    positions, targets, starts = [], [], [0]
    for b, row in enumerate(rows):
        end = 0
        for segment in row:
            ids_T, trained_T = tokens.segment(segment)
            start, end = end, end + len(ids_T)
            input_ids_BT[b, start:end] = ids_T
            position_ids_BT[b, start:end] = np.arange(end - start)
            segments_BT[b, start:end] = segment
            # Position t predicts token t + 1 of the same segment; a first token has no predecessor.
            predictors = np.flatnonzero(trained_T[1:])
            positions.append(predictors + start + b * num_tokens)
            targets.append(ids_T[1:][predictors])
            starts.append(end + b * num_tokens)
        # Where a mask is built, a lone segment's padding continues its positions: no second one, no mask.
        first = end if len(row) == 1 and multiple == 1 else 0
        position_ids_BT[b, end:] = np.arange(first, first + num_tokens - end)
    if len(rows) == 1 and starts[-1] < num_tokens:
        starts.append(num_tokens)
    return Batch(
        torch.from_numpy(input_ids_BT),
        torch.from_numpy(position_ids_BT),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        torch.tensor(starts, dtype=torch.int32),
        int(np.diff(starts).max()),
        tuple(map(len, targets)),
        None if draws is None else torch.from_numpy(draws.token_keys(segments_BT, position_ids_BT)),
    )


def empty_batch(pad_token_id: int) -> Batch:
    """Return a batch without a trained token: what a rank runs when the others have one more than it."""
    ids_12 = torch.full((1, 2), pad_token_id)
    places_12 = torch.arange(2).unsqueeze(0)
    none_0 = torch.empty(0, dtype=torch.int64)
    starts = torch.tensor([0, 2], dtype=torch.int32)
    return Batch(ids_12, places_12, none_0, none_0, starts, 2, draw_keys_BT=places_12.int())


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    # A copy from other memory waits for the kernels before it. torch keeps the pinned buffer until it is copied.
    staged = tensor.pin_memory() if device.type == "cuda" else tensor
    return staged.to(device, non_blocking=True)


def microbatches_for_rank(num_microbatches: int, rank: int, world_size: int) -> list[int | None]:
    """Return the numbers of the microbatches that `rank` runs; None where it runs an empty one.

    Every rank gets equally many: FSDP hangs otherwise.
    """
    num_forwards = math.ceil(num_microbatches / world_size)
    numbers = range(rank, num_forwards * world_size, world_size)
    return [number if number < num_microbatches else None for number in numbers]


def microbatch_seed(seed: int, step: int, number: int) -> int:
    """Return the random seed of a microbatch of older runs: from the step and its number in the global batch."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=2)
def _permutation(num_sequences: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_sequences)
