"""Several examples in one sequence: which examples share a pack."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

# Examples are packed window by window: lists of them stay short, and the work is linear in their number.
WINDOW_EXAMPLES = 1 << 15
# Packs of examples of all lengths give calmer gradients than fuller ones of like lengths, down to this share.
_FULL_ENOUGH = 0.98
# In examples of mean length: the room from which on a pack is filled. Measured on several sets: less leaves gaps that
# no one or two examples fill, more uses up the long ones too early.
_LAST_ROOM = 2.25


def pack_examples(lengths: np.ndarray, max_seq_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack examples of these lengths, in tokens, into sequences of at most `max_seq_length` tokens.

    Examples are drawn at random until a pack has room for about two more. It is filled with one or two that fit
    exactly, any such, else with the longest that fits. Where that leaves the packs less than 98 % full and drawing
    the longest first needs fewer of them, that is taken, though its packs hold examples of less mixed lengths. The
    packs come shuffled. Deterministic in its arguments.

    Returns:
        examples: int64 [num_examples], every example once.
        bounds: int64 [num_packs, 2], where in `examples` each pack begins and ends.
    """
    random = np.random.default_rng([seed, max_seq_length, len(lengths)])
    examples = random.permutation(len(lengths))
    sizes = array("q")
    start = 0
    for end in range(WINDOW_EXAMPLES, len(examples) + WINDOW_EXAMPLES, WINDOW_EXAMPLES):
        window = examples[start:end]
        packs = _pack_window(lengths[window], max_seq_length, random)
        window[:] = window[_match(lengths[window], np.concatenate(packs))]
        if end < len(examples):
            # Nothing was left to fill the last one with: its examples go into the next window.
            packs.pop()
        sizes.extend(map(len, packs))
        start += sum(map(len, packs))
    ends = np.cumsum(np.array(sizes, dtype=np.int64))
    bounds = np.stack([ends - sizes, ends], axis=1)
    return examples, bounds[random.permutation(len(bounds))]


def _match(lengths: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Return for each of the `packed` lengths the index in `lengths` of an example that has it, each once."""
    indices = np.empty_like(packed)
    indices[np.argsort(packed, kind="stable")] = np.argsort(lengths, kind="stable")
    return indices


def _pack_window(lengths: np.ndarray, capacity: int, random: np.random.Generator) -> list[list[int]]:
    """Return packs of these lengths, which are in random order."""
    packs = list(_draw_and_fill(lengths, capacity, random))
    if lengths.sum(dtype=np.int64) < _FULL_ENOUGH * len(packs) * capacity:
        longest_first = list(_draw_and_fill(-np.sort(-lengths), capacity, random))
        packs = min(packs, longest_first, key=len)
    return packs


def _draw_and_fill(lengths: np.ndarray, capacity: int, random: np.random.Generator) -> Iterator[list[int]]:
    """Yield packs of these lengths; they are drawn in this order."""
    stock = _Stock(lengths, capacity)
    last_room = _LAST_ROOM * float(lengths.mean())
    choices = iter(random.random(2 * len(lengths)).tolist())
    while length := stock.next():
        pack: list[int] = []
        room = capacity
        while 0 < length <= room and (not pack or room > last_room):
            pack.append(length)
            room -= length
            stock.draw()
            length = stock.next()
        while filling := stock.fill(room, next(choices)):
            pack += filling
            room -= sum(filling)
        yield pack


class _Stock:
    """The examples that aren't packed yet, by their lengths alone: bit l of `_present` tells if one of length l is left.

    `_mirrored` has the same bits in reverse order, bit l at `capacity` - l. The examples stand in line; those that
    were taken out of turn are remembered by length, and the next of that length leaves the line in their place.
    """

    def __init__(self, lengths: np.ndarray, capacity: int) -> None:
        self._line = lengths[::-1].tolist()
        counts = np.bincount(lengths, minlength=capacity + 1)
        self._present = _to_bits(counts > 0)
        self._mirrored = _to_bits(counts[::-1] > 0)
        self._counts: list[int] = counts.tolist()
        self._out_of_turn = [0] * (capacity + 1)
        self._capacity = capacity

    def next(self) -> int:
        """Return the length of the next in line, 0 at the end."""
        line, out_of_turn = self._line, self._out_of_turn
        while line and out_of_turn[line[-1]]:
            out_of_turn[line.pop()] -= 1
        return line[-1] if line else 0

    def draw(self) -> None:
        """Take the next in line."""
        self._remove(self._line.pop())

    def fill(self, room: int, choice: float) -> list[int]:
        """Take one or two lengths that fill `room` exactly, else the longest that fits, if any.

        `choice`, from 0 to 1, decides between several pairs.
        """
        if self._present >> room & 1:
            found = [room]
        elif pairs := self._find_pairs(room):
            shift = int(choice * pairs.bit_length())
            shift += _lowest_bit(pairs >> shift)
            found = [shift, room - shift]
        else:
            longest = (self._present & ((2 << room) - 1)).bit_length() - 1
            found = [longest] if longest > 0 else []
        for length in found:
            self._remove(length)
            self._out_of_turn[length] += 1
        return found

    def _find_pairs(self, room: int) -> int:
        """Return the bits of the lengths for which there is another that makes up `room` with it."""
        pairs = self._present & (self._mirrored >> (self._capacity - room))
        half = room // 2
        if 2 * half == room and self._counts[half] == 1:
            pairs &= ~(1 << half)
        return pairs

    def _remove(self, length: int) -> None:
        self._counts[length] -= 1
        if not self._counts[length]:
            self._present ^= 1 << length
            self._mirrored ^= 1 << (self._capacity - length)


def _to_bits(flags: np.ndarray) -> int:
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
