"""Several examples in one sequence: which examples share a pack."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

# Examples are packed window by window, so that packs mix and the work stays linear in their number.
WINDOW_EXAMPLES = 1 << 15
# Among so many examples there is nearly always one that just fills the rest of a pack.
POOL_EXAMPLES = 1024
# Packs of examples of all lengths give calmer gradients than fuller ones of like lengths, down to this share.
_FULL_ENOUGH = 0.98


def pack_examples(lengths: np.ndarray, max_seq_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack examples of these lengths, in tokens, into sequences of at most `max_seq_length` tokens.

    Examples are drawn at random, and the rest of each pack is filled with the longest that fits. Where that
    leaves the packs less than 98 % full (few examples fit into one) and longest-first best fit needs fewer,
    it is taken, though its packs hold examples of like lengths. The packs come shuffled. Deterministic in
    its arguments.

    Returns:
        examples: int64 [num_examples], every example once.
        bounds: int64 [num_packs, 2], where in `examples` each pack begins and ends.
    """
    random = np.random.default_rng([seed, max_seq_length, len(lengths)])
    order = random.permutation(len(lengths))
    examples, sizes = _collect(_draw_and_fill(order, lengths, max_seq_length, random), len(lengths))
    if lengths.sum(dtype=np.int64) < _FULL_ENOUGH * len(sizes) * max_seq_length:
        by_length = _collect(_fit_by_window(order, lengths, max_seq_length), len(lengths))
        if len(by_length[1]) < len(sizes):
            examples, sizes = by_length
    ends = np.cumsum(sizes)
    bounds = np.stack([ends - sizes, ends], axis=1)
    return examples, bounds[random.permutation(len(bounds))]


def _collect(packs: Iterable[list[int]], num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the packs' examples behind one another and the packs' sizes: 8 bytes an example, not a list."""
    examples = np.empty(num_examples, dtype=np.int64)
    sizes = array("q")
    end = 0
    for pack in packs:
        start, end = end, end + len(pack)
        examples[start:end] = pack
        sizes.append(len(pack))
    return examples, np.array(sizes, dtype=np.int64)


def _draw_and_fill(
    order: np.ndarray, lengths: np.ndarray, capacity: int, random: np.random.Generator
) -> Iterator[list[int]]:
    waiting = _take_in_order(order, lengths)
    pool = sorted(islice(waiting, POOL_EXAMPLES))
    draws = _draw(random)
    while pool:
        pack: list[int] = []
        room, is_drawing = capacity, True
        while room > 0 and pool:
            at = int(next(draws) * len(pool)) if is_drawing else -1
            if not is_drawing or pool[at][0] > room:
                is_drawing = False
                at = bisect_right(pool, (room, len(lengths))) - 1
                if at < 0:
                    break
            length, example = pool.pop(at)
            pack.append(example)
            room -= length
            if (following := next(waiting, None)) is not None:
                insort(pool, following)
        yield pack


def _take_in_order(order: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (length, example), turned into Python's integers a window at a time."""
    for start in range(0, len(order), WINDOW_EXAMPLES):
        window = order[start : start + WINDOW_EXAMPLES]
        yield from zip(lengths[window].tolist(), window.tolist(), strict=True)


def _draw(random: np.random.Generator) -> Iterator[float]:
    while True:
        yield from random.random(WINDOW_EXAMPLES).tolist()


def _fit_by_window(order: np.ndarray, lengths: np.ndarray, capacity: int) -> Iterator[list[int]]:
    for start in range(0, len(order), WINDOW_EXAMPLES):
        window = order[start : start + WINDOW_EXAMPLES]
        longest_first = window[np.argsort(-lengths[window], kind="stable")]
        yield from _best_fit(longest_first.tolist(), lengths[longest_first].tolist(), capacity)


def _best_fit(examples: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room_of_packs: dict[int, list[int]] = {}  # room left, in tokens → the packs that have it
    rooms: list[int] = []  # the keys of room_of_packs, sorted
    for example, length in zip(examples, lengths, strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, pack = capacity, len(packs)
            packs.append([example])
        else:
            room = rooms[at]
            pack = room_of_packs[room].pop()
            packs[pack].append(example)
            if not room_of_packs[room]:
                del room_of_packs[room]
                del rooms[at]
        left = room - length
        if left <= 0:
            continue
        if left not in room_of_packs:
            room_of_packs[left] = []
            insort(rooms, left)
        room_of_packs[left].append(pack)
    return packs
