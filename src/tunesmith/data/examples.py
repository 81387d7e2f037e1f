"""A tokenized example: what is packed, split, dropped and counted as one."""

from __future__ import annotations

from typing import NamedTuple

from tunesmith.data.align import Span


class Segment(NamedTuple):
    """One token sequence. `spans` are the runs of it that are trained, each its first token and the one after it."""

    input_ids: list[int]
    spans: list[Span]

    @property
    def trained(self) -> list[bool]:
        """Whether each token is trained."""
        trained = [False] * len(self.input_ids)
        for begin, stop in self.spans:
            trained[begin:stop] = [True] * (stop - begin)
        return trained


class Example(NamedTuple):
    """One segment, or several that share a row of the batch and don't see each other. `dataset_id` counts from 0."""

    segments: tuple[Segment, ...]
    dataset_id: int = 0
