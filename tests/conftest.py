"""What the tests share: an offline hub, and worker processes that are started once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
from workers import WorkerGroup


@pytest.fixture(scope="session")
def two_workers() -> Iterator[WorkerGroup]:
    """Two gloo processes of one thread each."""
    group = WorkerGroup(2)
    yield group
    group.close()
