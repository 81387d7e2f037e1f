"""Several examples in one sequence: which examples share a pack."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

# Examples are packed window by window, so that packs mix and the work stays linear in their number.
WINDOW_EXAMPLES = 1 << 15


def pack_examples(lengths: np.ndarray, max_seq_length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack examples of these lengths, in tokens, into sequences of at most `max_seq_length` tokens.

    Best fit, longest first, over a shuffled window; the packs come shuffled. Deterministic in its arguments.

    Returns:
        examples: int64 [num_examples], every example once.
        bounds: int64 [num_packs, 2], where in `examples` each pack begins and ends.
    """
    random = np.random.default_rng([seed, max_seq_length, len(lengths)])
    examples = random.permutation(len(lengths))
    sizes = []
    for start in range(0, len(examples), WINDOW_EXAMPLES):
        window = examples[start : start + WINDOW_EXAMPLES]
        longest_first = window[np.argsort(-lengths[window], kind="stable")]
        packs = _best_fit(longest_first.tolist(), lengths[longest_first].tolist(), max_seq_length)
        window[:] = np.concatenate([np.array(pack) for pack in packs])
        sizes.append(np.array([len(pack) for pack in packs], dtype=np.int64))
    ends = np.cumsum(np.concatenate(sizes)) if sizes else np.zeros(0, dtype=np.int64)
    bounds = np.stack([np.concatenate([[0], ends[:-1]])[: len(ends)], ends], axis=1)
    return examples, bounds[random.permutation(len(bounds))]


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
