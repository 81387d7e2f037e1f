"""That a GPU's memory ran out, told to the attempts that follow: planned as before, they would fail as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tunesmith.runs.folder import RunDir

# By how much more than was planned an attempt needs after a shortage, and again after each.
_FACTOR = 1.15
_MOST_COUNTED = 4


@contextmanager
def shortage_noted(run: RunDir, rank: int) -> Iterator[None]:
    """Note in the run folder that this rank found no memory left inside."""
    try:
        yield
    except torch.OutOfMemoryError:
        with run.shortages_path.open("a") as file:
            file.write(f"{rank}\n")
        raise


def factor_after_shortages(run: RunDir) -> float:
    """Return by how much more than is planned an attempt needs, as far as those before it have shown."""
    if not run.shortages_path.exists():
        return 1.0
    # Several ranks may run short in one attempt.
    times = Counter(run.shortages_path.read_text().split())
    return float(_FACTOR ** min(max(times.values(), default=0), _MOST_COUNTED))
