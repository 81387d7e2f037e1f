"""What each epoch trains on where data sets have weights: drawn anew and packed anew, from the seed and the epoch alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.config import TrainConfig
from tunesmith.data.packing import pack_examples
from tunesmith.data.token_set import Packs

if TYPE_CHECKING:
    from tunesmith.data.token_set import TokenSet

# The number of the random stream of the draws: another than that of the order.
_STREAM = 0x77656967687473


class Epochs:
    """The sequences of each epoch, counted through: those of epoch 1 come behind those of epoch 0."""

    def __init__(
        self, tokens: TokenSet, weights: Sequence[float], packing: bool, pack_tokens: int, seed: int
    ) -> None:
        self._tokens = tokens
        self._weights = weights
        self._packing = packing
        self._pack_tokens = pack_tokens
        self._seed = seed
        # Where nothing is drawn, all epochs are the same.
        self._is_drawn = any(weight % 1 for weight in weights)
        self._packs_of = lru_cache(maxsize=2)(self._pack)
        self._firsts = [0]
        # The sequences of every epoch, where they are equally many.
        self._size = None if self._is_drawn and packing else len(self._packs(0))

    def num_sequences(self, epoch: int) -> int:
        """Return how many sequences an epoch has."""
        return self.first(epoch + 1) - self.first(epoch)

    def first(self, epoch: int) -> int:
        """Return the number of an epoch's first sequence."""
        if self._size is not None:
            return epoch * self._size
        while len(self._firsts) <= epoch:
            self._firsts.append(self._firsts[-1] + len(self._packs(len(self._firsts) - 1)))
        return self._firsts[epoch]

    def examples(self, sequence: int) -> np.ndarray:
        """Return the examples of a sequence, int64."""
        if self._size is not None:
            epoch = sequence // self._size
        else:
            while self._firsts[-1] <= sequence:
                self.first(len(self._firsts))
            epoch = bisect_right(self._firsts, sequence) - 1
        return self._packs(epoch)[sequence - self.first(epoch)]

    def draw(self, epoch: int) -> np.ndarray:
        """Return the examples of an epoch, int64, by data set: as often as their weight is whole, and a sample for the rest."""
        parts = []
        for dataset_id, weight in enumerate(self._weights):
            own = np.flatnonzero(self._tokens.dataset_ids == dataset_id)
            parts += [own] * int(weight)
            random = np.random.Generator(np.random.PCG64([self._seed, epoch, dataset_id, _STREAM]))
            parts.append(np.sort(random.choice(own, round(len(own) * (weight % 1)), replace=False)))
        return np.concatenate(parts)

    def _packs(self, epoch: int) -> Packs:
        return self._packs_of(epoch if self._is_drawn else 0)

    def _pack(self, epoch: int) -> Packs:
        examples = self.draw(epoch)
        if not self._packing:
            ends = np.arange(1, len(examples) + 1)
            return Packs(examples, np.stack([ends - 1, ends], axis=1))
        seed = int(np.random.SeedSequence([self._seed, epoch, _STREAM]).generate_state(1)[0])
        order, bounds = pack_examples(self._tokens.lengths[examples], self._pack_tokens, seed)
        return Packs(examples[order], bounds)


def plan_epochs(tokens: TokenSet, config: TrainConfig, packing: bool) -> Epochs | None:
    """Return the epochs of a training set whose data sets have weights; None where none has: all are the set as it is."""
    weights = [settings.weight for settings in config.data_sets]
    if all(weight == 1.0 for weight in weights):
        return None
    return Epochs(tokens, weights, packing, tokens.num_segments * config.max_seq_length, config.seed)
